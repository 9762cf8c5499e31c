"""Documents: their links resolve, and docs/README.md lists every page and every decision."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
INDEX = (DOCS / "README.md").read_text()
PAGES = sorted(path for folder in (ROOT, DOCS, ROOT / "app" / "web") for path in folder.glob("*.md"))
PAGES += sorted(path for path in DOCS.glob("*/*.md"))


def text_of(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_index_lists_every_page() -> None:
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"^\| \[[\w.-]+\]\(([\w.-]+\.md)\) \|", INDEX, re.MULTILINE))


def test_index_lists_every_decision_by_its_number_and_counts_them() -> None:
    decisions = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]
    rows = re.findall(r"^\| (\d+) \| \[[^\]]+\]\((decisions/[\w.-]+)\) \|$", INDEX, re.MULTILINE)
    assert rows == [(str(number), name) for number, name in enumerate(decisions, 1)]
    assert f"| {len(decisions)} decisions " in INDEX
