"""docs/api.md and the OpenAPI document describe the same routes, parameters and results."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from app.api.results import RESULT_NAMES
from app.api.stow import NO_CAPACITY, NOT_UNDERSTOOD, OTHER_CLASS, OTHER_STUDY
from app.ingest.dicom.instances import IMAGE_CLASSES
from app.main import create_app
from app.settings import Settings
from tests.api.support import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
PAGE, DICOM_PAGE = ((ROOT / "docs" / name).read_text() for name in ("api.md", "dicom.md"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return create_app(Settings(store=str(tmp_path_factory.mktemp("store"))), FakeEngine())


def test_every_route_is_documented_and_no_other(app: FastAPI) -> None:
    documented = set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", PAGE, re.MULTILINE))
    routes = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    results = {f"GET /v1/scans/{{job}}/{name}" for name in RESULT_NAMES}
    assert results <= routes
    assert documented == routes - results | {"GET /v1/scans/{job}/{name}"}


def test_every_parameter_is_documented(app: FastAPI) -> None:
    operations = [operation for methods in app.openapi()["paths"].values() for operation in methods.values()]
    parameters = {p["name"] for operation in operations for p in operation.get("parameters", []) if p["in"] != "path"}
    documented = {name.lower() for name in re.findall(r"`([\w-]+)`", PAGE)}
    assert {name.lower() for name in parameters} - documented == {"if-none-match"}


def test_every_result_is_documented_and_no_other() -> None:
    table = PAGE.partition("## Results")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)) == RESULT_NAMES


def test_openapi_describes_the_upload(app: FastAPI) -> None:
    upload = app.openapi()["paths"]["/v1/scans"]["post"]
    assert set(upload["requestBody"]["content"]) == {
        "application/octet-stream",
        "application/gzip",
        "multipart/form-data",
        "multipart/related",
        "application/json",
    }
    statuses = {200, 202, 400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 502, 503, 507}
    assert set(upload["responses"]) == {str(status) for status in statuses}


def test_openapi_describes_no_answer_that_only_the_framework_gives(app: FastAPI) -> None:
    document = app.openapi()
    assert "HTTPValidationError" not in str(document)
    assert not document["components"]["schemas"].keys() & {"HTTPValidationError", "ValidationError"}
    scan = document["paths"]["/v1/scans/{job}"]["get"]["responses"]
    assert set(scan) == {"200", "401", "403", "404", "503"}
    assert document["paths"]["/v1/scans/{job}/report.json"]["get"]["responses"]["422"]["description"] == "Problem"
    assert app.openapi() is document


def test_worker_serves_only_health_and_metrics(tmp_path: Path) -> None:
    app = create_app(Settings(store=str(tmp_path)), FakeEngine(), api=False)
    assert set(app.openapi()["paths"]) == {"/livez", "/readyz", "/metrics"}


def test_every_row_of_the_dicomweb_services_names_an_existing_test() -> None:
    section = DICOM_PAGE.partition("\n## DICOMweb services\n")[2].partition("\n## ")[0]
    table, classes = section.split("Classes that STOW-RS stores")[:2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 21
    for row in rows:
        (found,) = re.findall(r"\| `(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert re.search(rf"^def {found[1]}\(", (ROOT / found[0]).read_text(), re.MULTILINE), found
    assert re.findall(r"\| ([\d.]+) \|$", classes, re.MULTILINE) == sorted(map(str, IMAGE_CLASSES))


def test_every_failure_reason_is_documented() -> None:
    page = (ROOT / "docs" / "dicomweb.md").read_text()
    documented = {
        int(code, 16): int(number) for code, number in re.findall(r"^\| ([0-9A-F]{4}) \((\d+)\) \|", page, re.MULTILINE)
    }
    assert documented == {reason: reason for reason in (NO_CAPACITY, OTHER_STUDY, NOT_UNDERSTOOD, OTHER_CLASS)}
