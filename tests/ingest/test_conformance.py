"""Comparison of the tables in docs/dicom.md with the code; every row names an existing test."""

import re
from pathlib import Path

from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS
from pydicom.uid import UID

from app.ingest.dicom import pixels, sequence, series
from app.ingest.reader import DEFAULT_LIMITS
from tests.ingest.test_pixels import CHARACTER_SETS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "dicom.md").read_text()
READ = TEXT[TEXT.index("## Supported input") :].partition("\n## ")[0]


def rows(heading: str, number: int = 0) -> list[list[str]]:
    """Return the cells of a table below a heading, without its first two lines."""
    section = READ.split(f"### {heading}\n")[1].partition("\n### ")[0]
    tables = re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE)
    table = tables[number].splitlines() if number < len(tables) else []
    return [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in table[2:]]


def test_every_row_names_an_existing_test() -> None:
    headings = re.findall(r"^### (.+)$", READ, re.MULTILINE)
    tables = [(heading, rows(heading, number)) for heading in headings for number in (0, 1)]
    assert sum(len(table) for _, table in tables) >= 62
    for heading, table in tables:
        for row in table:
            assert any(re.search(r"^`tests/.+::test_.+`$", cell) for cell in row), (heading, row)
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", READ):
        assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_row_of_files_names_a_test_with_real_files() -> None:
    for heading in ("SOP classes", "Transfer syntaxes", "Pixels"):
        for row in rows(heading):
            assert row[-1] == "none" or "test_real_series.py::" in row[-1], (heading, row)


def test_transfer_syntaxes_match_the_decoders() -> None:
    assert pixels  # its import registers decoders
    decodable = {str(uid) for uid, (decoder, *_) in _PIXEL_DATA_DECODERS.items() if decoder.is_available}
    listed = {row[1] for row in rows("Transfer syntaxes")}
    assert listed == decodable
    assert all(UID(row[1]).name == row[0] for row in rows("Transfer syntaxes"))


def test_sop_classes_have_their_names() -> None:
    for name, uid, *_ in rows("SOP classes"):
        assert UID(uid).name == name.partition(",")[0]


def test_exclusion_rules_match_the_code() -> None:
    assert [row[1] for row in rows("Selection of the stack")] == [name for name, _ in series.EXCLUSION_RULES]


def test_sequences_match_the_code() -> None:
    table = rows("Selection of the model", 1)
    assert [row[0] for row in table] == list(sequence.NAME_PATTERNS)
    assert {row[1]: row[0] for row in table if row[1]} == sequence.CONTRAST_CODES
    for name, _, words, _, _ in table:
        for word in words.partition(";")[0].split(", "):
            assert re.search(sequence.NAME_PATTERNS[name], word), (name, word)
    times = {row[0]: list(map(int, re.findall(r"\d+(?= |;|$)", re.sub(r"T[12]\*?", "", row[3])))) for row in table}
    short, long, late = sequence.MAX_SHORT_ECHO, sequence.MIN_LONG_ECHO, sequence.MIN_T2_STAR_ECHO
    assert times["T1"] == [short, sequence.MAX_SHORT_REPETITION, *sequence.T1_INVERSION, short]
    assert times["T2*"] == [late]
    assert times["T2"] == [long, sequence.MIN_LONG_REPETITION]
    assert times["FLAIR"] == [sequence.MIN_FLAIR_INVERSION, long]
    assert times["PD"] == [short, sequence.MIN_LONG_REPETITION]
    assert times["STIR"] == list(sequence.STIR_INVERSION)


def test_character_sets_match_the_tests() -> None:
    assert [row[0].replace("none (ISO 646)", "") for row in rows("Character sets")] == [
        charset.removeprefix("\\") for charset in CHARACTER_SETS
    ]


def test_limits_match_the_code() -> None:
    values = [int(row[1]) for row in rows("Limits")]
    assert values == [DEFAULT_LIMITS.max_inflated_bytes, DEFAULT_LIMITS.max_files, DEFAULT_LIMITS.max_voxels]
