"""Print page, model page, embedded viewer, and accessibility of all pages."""

import json
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.api.service_process import CHECKOUT, RunningService
from tests.web.browser import differs, open_viewer, pixels

NOTICE = "Research use only"


def faults_of(page: Page) -> list[tuple[str, str, list[str]]]:
    """Return the violations that axe finds: rule, impact, elements."""
    answer: dict[str, Any] = Axe().run(page).response
    return [
        (rule["id"], rule["impact"], [node["html"][:120] for node in rule["nodes"]]) for rule in answer["violations"]
    ]


@pytest.mark.parametrize("path", ["", "models", "scans/{job}", "scans/{job}/print", "embed/{job}"])
def test_axe_finds_nothing(page: Page, url: str, finished: str, path: str) -> None:
    target = f"{url}/{path.format(job=finished)}"
    if "{job}" in path:
        open_viewer(page, target)
    else:
        page.goto(target)
        page.locator("#scans tr, #card h2").first.wait_for()
    assert faults_of(page) == []
    expect(page.locator("body")).to_contain_text(NOTICE)


def test_axe_finds_nothing_in_dialogs_and_problems(page: Page, url: str, finished: str) -> None:
    page.goto(url)
    page.set_input_files("#files", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no image " * 100})
    page.locator("#uploads .problem").wait_for()
    page.locator(f'tr[data-id="{finished}"]').press("Delete")
    page.get_by_role("dialog").wait_for()
    assert faults_of(page) == []


def test_print_page_shows_pictures_numbers_and_provenance(
    page: Page, url: str, finished: str, service: RunningService
) -> None:
    report = service.http.get(f"/v1/scans/{finished}/report.json").json()
    open_viewer(page, f"{url}/scans/{finished}/print")
    sheet = page.locator(".sheet")
    (finding,) = report["findings"]
    texts = [report["model"]["id"], report["model"]["sha256"][:16], report["code_version"], finished]
    texts += [str(report["threshold"]), str(report["model"]["seed"]), NOTICE, f"{finding['peak_score']:.3f}"]
    texts += ["brighter" if finding["mean_difference"] > 0 else "darker"]
    for text in texts:
        expect(sheet).to_contain_text(text)
    figure = pixels(page.locator("#figure"))
    colourful = (figure.max(axis=2) - figure.min(axis=2)) > 60
    width = figure.shape[1]
    # Grey scan and counterpart on the left, coloured map and outline on the right.
    assert colourful[:, : width // 2 - 20].mean() < 0.001
    assert colourful[:, width // 2 :].mean() > 0.005
    quarter = width // 4
    assert differs(figure[:, 10:quarter], figure[:, quarter + 10 : 2 * quarter])


def test_print_page_shows_the_verdict_of_each_reader_as_text(page: Page, url: str, disputed: str) -> None:
    page.goto(f"{url}/scans/{disputed}/print")
    verdicts = page.locator("#findings td").last.locator("div")
    expect(verdicts).to_have_text(["unsure by A: Beside the ventricle.", "wrong by B: <b>Motion</b>"])


def test_print_page_does_not_claim_that_there_is_no_verdict_if_it_cannot_read_them(
    page: Page, url: str, disputed: str
) -> None:
    page.route("**/reviews", lambda route: route.abort())
    page.goto(f"{url}/scans/{disputed}/print")
    expect(page.locator("#findings td").last).to_have_text("not available")


def test_print_page_fits_one_sheet_of_paper(page: Page, url: str, finished: str) -> None:
    open_viewer(page, f"{url}/scans/{finished}/print")
    document = page.pdf(format="A4", print_background=True)
    assert document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") == 1
    page.emulate_media(media="print")
    expect(page.get_by_role("button", name="Print")).to_be_hidden()
    background = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert background == "rgb(255, 255, 255)"


def test_model_page_renders_the_card_without_markup_of_its_own(page: Page, url: str, service: RunningService) -> None:
    models = service.http.get("/v1/models").json()["models"]
    page.goto(f"{url}/models#{models[0]['id']}")
    card = page.locator("#card")
    expect(card).to_contain_text(models[0]["intended_use"])
    expect(card.locator("h3", has_text="Known failures")).to_be_visible()
    assert card.locator("table").count() >= 1
    assert "**" not in card.inner_text()

    attack = "# <img src=x onerror=alert(1)>\n\n[click](javascript:alert(1)) `a` **b**\n\n- <script>alert(1)</script>"
    answer = service.http.get(models[0]["link"]).json() | {"card": attack}
    page.route(f"**{models[0]['link']}", lambda route: route.fulfill(body=json.dumps(answer)))
    page.reload()
    expect(card).to_contain_text("<img src=x onerror=alert(1)>")
    assert card.locator("img, script, a").count() == 0


def test_embedded_viewer_has_no_navigation(page: Page, url: str, finished: str) -> None:
    open_viewer(page, f"{url}/embed/{finished}")
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.locator(".research")).to_be_visible()
    expect(page.locator("#findings tr")).to_have_count(1)


def test_no_page_sets_markup_from_text() -> None:
    sources = {path: path.read_text() for path in (CHECKOUT / "app" / "web" / "js").glob("*.js")}
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new EventSource"):
        assert [path.name for path, text in sources.items() if word in text] == []


@pytest.mark.parametrize("width", [1280, 3840])
def test_pages_fit_narrow_and_wide_screens(page: Page, url: str, finished: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 720 * width // 1280})
    for path in ("", "models", f"scans/{finished}"):
        page.goto(f"{url}/{path}")
        page.wait_for_timeout(300)
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
    sizes = page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
    assert np.isclose(sizes, 14, atol=0.5) if width == 1280 else sizes > 20
