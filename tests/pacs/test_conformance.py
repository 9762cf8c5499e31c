"""The section "DICOM services" of docs/dicom.md and docs/pacs.md agree with the code; every row names a test."""

import re
from pathlib import Path

from pydicom.uid import UID

from app.export.outputs import DICOM_NAMES
from app.ingest.dicom.storage import STORAGE_CLASSES, TRANSFER_SYNTAXES
from app.pacs import receiver
from app.pacs.routes import DimseTarget, Route, Routes, StowTarget, read_routes
from app.pacs.senders import STORED
from tests.ingest.test_conformance import rows as rows_of_input

ROOT = Path(__file__).resolve().parents[2]
DICOM = (ROOT / "docs" / "dicom.md").read_text()
SERVICES = DICOM.partition("## DICOM services\n")[2].partition("\n## ")[0]
PACS = (ROOT / "docs" / "pacs.md").read_text()


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables of a text, without their headings."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    found = [[cell.strip() for cell in line.split("|")] for line in lines]
    headings = {number - 1 for number, cells in enumerate(found) if set("".join(cells)) <= {"-", " "}}
    return [cells for number, cells in enumerate(found) if not {number, number - 1} & headings]


def value(name: str) -> str:
    """Return the second cell of the first row with a name."""
    return next(cells[1] for cells in rows(SERVICES) if cells[0] == name)


def test_every_row_names_an_existing_test() -> None:
    table = rows(SERVICES)
    assert len(table) >= 20
    for cells in table:
        file, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(\w+)`", cells[-1]).groups()  # type: ignore[union-attr]
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), cells[-1]


def test_accepted_classes_are_those_of_the_code() -> None:
    node = SERVICES.partition("### Delivery")[0]
    stored = [cells[1:3] for cells in rows(node) if cells[0] == "C-STORE"]
    assert stored == [[UID(uid).name, str(uid)] for uid in STORAGE_CLASSES]


def test_accepted_syntaxes_are_those_that_can_be_read() -> None:
    assert {str(uid) for uid in TRANSFER_SYNTAXES} == {cells[1] for cells in rows_of_input("Transfer syntaxes")}


def test_limits_are_those_of_the_code() -> None:
    assert value("associations at once") == str(receiver.MAX_ASSOCIATIONS)
    assert value("largest PDU") == f"{receiver.MAX_PDU_BYTES} bytes"
    limits = f"{receiver.ACSE_SECONDS} s for the negotiation, {receiver.NETWORK_SECONDS} s without a byte"
    assert value("time limits") == limits


def test_statuses_are_those_of_the_code() -> None:
    statuses = [cells[0] for cells in rows(SERVICES) if re.fullmatch(r"[0-9A-F]{4}", cells[0])]
    used = (receiver.SUCCESS, receiver.OUT_OF_RESOURCES, receiver.WRONG_CLASS, receiver.CANNOT_UNDERSTAND)
    assert statuses == [f"{status:04X}" for status in used]
    assert {int(text, 16) for text in re.findall(r"\b[0-9AB]\d{3}\b", value("stored"))} == STORED


def test_every_key_of_the_routes_is_documented(tmp_path: Path) -> None:
    models = (DimseTarget, StowTarget, Route, Routes)
    keys = {name for model in models for name in model.model_fields} - {"targets", "routes"}
    table = PACS.partition("| key |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table.replace("`true`", ""))) - {"dimse", "stow", "COUNTERPART"} == keys
    (tmp_path / "routes.toml").write_text(PACS.partition("```toml\n")[2].partition("```")[0])
    example = read_routes(tmp_path / "routes.toml")
    assert example.routes[0].results == DICOM_NAMES[:3]


def test_delivered_classes_are_those_of_the_dicom_results() -> None:
    results = {cells[0].strip("`"): cells[2] for cells in rows(DICOM) if cells[0].strip("`") in DICOM_NAMES}
    delivered = [cells[2] for cells in rows(SERVICES.partition("### Delivery")[2]) if cells[0] == "C-STORE, STOW-RS"]
    assert list(results) == list(DICOM_NAMES)
    assert delivered == list(results.values())


def test_a_route_takes_every_dicom_result() -> None:
    assert Route(target="archive", results=DICOM_NAMES).results == DICOM_NAMES
