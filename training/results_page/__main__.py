"""Command that writes docs/RESULTS.md and its figures from the records: `python -m training.results_page`.

It reads docs/evaluation, docs/results and docs/BENCHMARKS.json. It needs no scan and runs no network.
"""

from pathlib import Path

from training.experiments.markdown import fill_template
from training.results_page import sections
from training.results_page.aims import make_aims
from training.results_page.groups import haemorrhage_groups, home_groups, together, unseen_groups
from training.results_page.records import DOCS, EARLIER_FILE, EARLIER_VERSION, Records

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = DOCS / "RESULTS.md"
FIGURES = DOCS / "figures"


def make_people(records: Records) -> str:
    """Return how many people stand for each part."""
    sentences = []
    if home := home_groups(records):
        sentences.append(f"Home: {min(g.scans for g in home)} to {max(g.scans for g in home)} scans of a source.")
    if unseen := unseen_groups(records):
        single = sum(group.scans == 1 for group in unseen)
        people = together(unseen).scans
        sentences.append(f"Other scanners: {people} people, {len(unseen)} scanners, {single} of them with one person.")
    if groups := haemorrhage_groups(records):
        with_it, without = len(groups[0].affected), len(groups[0].unaffected)
        sentences.append(f"Haemorrhage: {with_it} adults with and {without} without.")
    return " ".join(sentences)


def make_versions(*texts: str) -> str:
    """Explain the marks of earlier bundles that the texts contain."""
    notes = {
        EARLIER_VERSION: "measured with a version of the model before the present one",
        EARLIER_FILE: "measured before the file of this version was edited; its evaluation states what changed",
    }
    used = [f"**{mark.capitalize()}**: {note}." for mark, note in notes.items() if any(f"({mark})" in s for s in texts)]
    return f"- {' '.join(used)}\n" if used else ""


def write(page: Path = PAGE, folder: Path = FIGURES, records: Records | None = None) -> None:
    """Write the page and its figures.

    Parameters
    ----------
    page : Path
    folder : Path
        Folder of the figures.
    records : Records, optional
        The records below docs/ by default.
    """
    records = records or Records.load()
    makers = {
        "home": sections.make_home,
        "unseen": sections.make_unseen,
        "real": sections.make_real,
        "haemorrhage": sections.make_haemorrhage,
        "time": sections.make_time,
    }
    made = {name: make(records, folder) for name, make in makers.items()} | {"aims": make_aims(records)}
    values = {**made, "people": make_people(records), "versions": make_versions(*made.values())}
    page.write_text(fill_template(TEMPLATE.read_text(), values))


if __name__ == "__main__":
    write()
