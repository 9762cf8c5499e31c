"""docs/dicom.md says what the code reads, and every row of it has a test."""

import re
from pathlib import Path

from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS
from pydicom.uid import UID

from app.ingest import STANDARD, pixels, series
from tests.ingest.test_pixels import CHARACTER_SETS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "dicom.md").read_text()
READ = TEXT[TEXT.index("## What is read") :].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its first two lines."""
    section = READ.split(f"### {heading}\n")[1].partition("\n### ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def test_every_row_names_a_test_that_there_is() -> None:
    headings = re.findall(r"^### (.+)$", READ, re.MULTILINE)
    tables = {heading: rows(heading) for heading in headings}
    assert sum(map(len, tables.values())) >= 40
    for heading, table in tables.items():
        for row in table:
            assert re.search(r"`tests/.+::test_.+`", row[-1]), (heading, row)
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", READ):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_transfer_syntaxes_are_those_that_can_be_decoded() -> None:
    assert pixels  # it registers decoders
    able = {str(uid) for uid, (decoder, *_) in _PIXEL_DATA_DECODERS.items() if decoder.is_available}
    listed = {row[1] for row in rows("Transfer syntaxes")}
    assert listed == able
    assert all(UID(row[1]).name == row[0] for row in rows("Transfer syntaxes"))


def test_the_sop_classes_have_their_names() -> None:
    for name, uid, *_ in rows("SOP classes"):
        assert UID(uid).name == name.partition(",")[0]


def test_the_rules_are_those_of_the_code_in_their_order() -> None:
    assert [row[1] for row in rows("Which stack is read")] == [what for what, _ in series._RULES]


def test_the_character_sets_are_those_that_are_tested() -> None:
    assert [row[0].replace("none (ISO 646)", "") for row in rows("Character sets")] == [
        charset.removeprefix("\\") for charset in CHARACTER_SETS
    ]


def test_the_limits_are_those_of_the_code() -> None:
    values = [int(row[1]) for row in rows("Limits")]
    assert values == [STANDARD.max_inflated_bytes, STANDARD.max_files, STANDARD.max_voxels]
