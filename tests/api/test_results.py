"""Fetch result files."""

import json

import pytest
from fastapi.testclient import TestClient

from app.export.outputs import OUTPUTS, Output
from tests.api.support import URL, send


@pytest.fixture(scope="module")
def url(client: TestClient) -> str:
    return f"{URL}/{send(client).json()['id']}"


def test_result_is_sent_with_its_headers(client: TestClient, url: str) -> None:
    whole = client.get(f"{url}/mask.nii.gz")
    assert whole.content == b"mask.nii.gz" * 10
    assert whole.headers["content-type"] == "application/gzip"
    assert f'filename="{url.rpartition("/")[2]}-mask.nii.gz"' in whole.headers["content-disposition"]

    head = client.head(f"{url}/mask.nii.gz")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == "110"
    assert head.headers["etag"] == whole.headers["etag"]


def test_range_and_etag_are_supported(client: TestClient, url: str) -> None:
    etag = client.head(f"{url}/mask.nii.gz").headers["etag"]
    part = client.get(f"{url}/mask.nii.gz", headers={"Range": "bytes=5-8", "If-Range": etag})
    assert (part.status_code, part.content) == (206, b"nii.")
    assert part.headers["content-range"] == "bytes 5-8/110"

    unchanged = client.get(f"{url}/mask.nii.gz", headers={"If-None-Match": f'"x", {etag}'})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


@pytest.mark.parametrize(
    ("value", "status", "code"),
    [
        ("bytes=110-", 416, "unsatisfiable_range"),
        ("bytes=9-5", 400, "bad_range"),
        ("lines=1-2", 400, "bad_range"),
        ("nonsense", 400, "bad_range"),
    ],
)
def test_bad_range_is_a_problem(client: TestClient, url: str, value: str, status: int, code: str) -> None:
    answer = client.get(f"{url}/mask.nii.gz", headers={"Range": value})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("content-range") == ("bytes */110" if status == 416 else None)


def test_unknown_result_name_is_404(client: TestClient, url: str) -> None:
    answer = client.get(f"{url}/scan.nii.gz")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_report_of_an_older_version_is_still_read(client: TestClient) -> None:
    """Version 0.1.0 wrote neither the extent threshold nor the reasons for absent results."""
    job = send(client, name="of 0.1.0").json()["links"]["self"]
    store = client.app.state.services.store.root  # type: ignore[attr-defined]
    path = store / "jobs" / job.rpartition("/")[2] / "results" / "report.json"
    report = json.loads(path.read_text())
    del report["extent_threshold"], report["absent"]
    path.write_text(json.dumps(report))
    shown = client.get(job).json()
    assert (shown["state"], shown["lesion_volume_ml"], shown["findings"][0]["label"]) == ("succeeded", 2.5, 1)
    missing = client.get(f"{job}/report.dcm")
    assert (missing.status_code, missing.json()["code"]) == (404, "no_such_result")


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.name)
def test_openapi_has_one_operation_with_one_media_type_for_each_result(client: TestClient, output: Output) -> None:
    operation = client.get("/openapi.json").json()["paths"][f"/v1/scans/{{job}}/{output.name}"]["get"]
    assert operation["operationId"] == "get_" + output.name.replace(".", "_")
    answer = operation["responses"]["200"]
    assert list(answer["content"]) == [output.media_type]
    assert {"ETag", "Content-Disposition"} <= set(answer["headers"])
    if output.name == "report.json":
        assert answer["content"][output.media_type]["schema"] == {"$ref": "#/components/schemas/Report"}


def test_operation_ids_are_the_names_of_the_functions(client: TestClient) -> None:
    """Generated clients use them as names of their functions."""
    paths = client.get("/openapi.json").json()["paths"]
    ids = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)
    assert {"send_scan", "list_scans", "get_scan", "cancel_scan", "erase_scan", "follow_scan"} <= set(ids)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (URL, "GET, OPTIONS, POST"),
        (f"{URL}/x", "DELETE, GET, OPTIONS"),
        (f"{URL}/x/mask.nii.gz", "GET, HEAD, OPTIONS"),
        (f"{URL}/x/cancel", "OPTIONS, POST"),
        ("/v1/models", "GET, OPTIONS"),
    ],
)
def test_allow_names_all_methods_of_a_path(client: TestClient, path: str, allowed: str) -> None:
    options = client.options(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")
    refused = client.put(path)
    assert (refused.status_code, refused.headers["allow"], refused.json()["expected"]) == (405, allowed, f"{allowed}.")
    assert client.options("/v1/none").status_code == 404
