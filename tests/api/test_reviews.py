"""Reviews of findings over HTTP."""

import csv
import io
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.api.reviews import FORMULA_STARTS, MAX_NOTE, MAX_READER
from tests.api.support import URL, send, send_running


def finished(client: TestClient, name: str) -> str:
    job: str = send(client, name=name).json()["id"]
    return job


def put(client: TestClient, job: str, verdict: str, label: int = 1, **fields: str) -> httpx2.Response:
    return client.put(f"{URL}/{job}/reviews/{label}", json={"verdict": verdict, **fields})


def test_review_is_kept_listed_counted_and_changes_no_result(client: TestClient) -> None:
    job = finished(client, "reviewed")
    report = client.get(f"{URL}/{job}/report.json").content
    first = put(client, job, "right")
    assert (first.status_code, first.json()["verdict"], first.json()["note"]) == (200, "right", "")
    assert put(client, job, "right").json() == first.json()
    put(client, job, "wrong", reader="B", note="Motion ± ≥")
    put(client, job, "unsure", reader="B")

    listed = client.get(client.get(f"{URL}/{job}").json()["links"]["reviews"]).json()
    assert [(r["label"], r["verdict"], r["reader"]) for r in listed["reviews"]] == [
        (1, "right", ""),
        (1, "unsure", "B"),
    ]
    assert [(r["verdict"], r["note"]) for r in listed["history"]] == [
        ("right", ""),
        ("wrong", "Motion ± ≥"),
        ("unsure", ""),
    ]
    counts = {shown["id"]: shown["reviews"] for shown in client.get(URL).json()["scans"]}
    assert counts[job] == client.get(f"{URL}/{job}").json()["reviews"] == {"right": 1, "wrong": 0, "unsure": 1}
    assert client.get(f"{URL}/{job}/report.json").content == report

    for _ in range(2):
        assert client.delete(f"{URL}/{job}/reviews/1?reader=B").status_code == 204
    assert len(client.get(f"{URL}/{job}/reviews").json()["history"]) == 1
    client.delete(f"{URL}/{job}")
    assert client.get(f"{URL}/{job}/reviews").status_code == 404
    assert job not in client.get("/v1/reviews").text


@pytest.mark.parametrize("label", ["2", "0", "-1", "x", str(2**70)])
def test_unknown_label_is_404(client: TestClient, label: str) -> None:
    job = finished(client, "labels")
    for answer in (
        client.put(f"{URL}/{job}/reviews/{label}", json={"verdict": "right"}),
        client.delete(f"{URL}/{job}/reviews/{label}"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_only_a_succeeded_job_can_be_reviewed(client: TestClient) -> None:
    failed = send(client, raise_error="OutOfDistribution", name="failed").headers["location"].rpartition("/")[2]
    running = send_running(client, name="not reviewed yet")
    for job in (running, failed):
        for answer in (put(client, job, "right"), client.get(f"{URL}/{job}/reviews")):
            assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")
    client.delete(f"{URL}/{running}")
    assert put(client, "0" * 16 + "-" + "0" * 16, "right").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "bad_request"),
        (b"{", 400, "bad_request"),
        (b'{"verdict": "maybe"}', 400, "bad_request"),
        (b'{"verdict": "right", "note": "%s"}' % (b"x" * (MAX_NOTE + 1)), 400, "bad_request"),
        (b'{"verdict": "right", "reader": "%s"}' % (b"x" * (MAX_READER + 1)), 400, "bad_request"),
        (b'{"verdict": "right", "note": "a\\u0000b"}', 400, "bad_request"),
        (b'{"verdict": "right", "note": "\\ud800"}', 400, "bad_request"),
        (b'{"verdict": "right"}' + b" " * 20_000, 413, "upload_too_large"),
    ],
)
def test_bad_review_is_refused_without_repeating_it(client: TestClient, body: bytes, status: int, code: str) -> None:
    job = finished(client, "refused")
    answer = client.put(f"{URL}/{job}/reviews/1", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "maybe" not in answer.text
    assert "xxx" not in answer.text
    assert client.get(f"{URL}/{job}/reviews").json()["history"] == []


def test_longest_note_is_accepted(client: TestClient) -> None:
    job = finished(client, "long")
    assert put(client, job, "right", note="\U0001f9e0" * MAX_NOTE).status_code == 200


def read_csv(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_export_has_the_finding_of_each_verdict(client: TestClient) -> None:
    job = finished(client, "exported")
    put(client, job, "right", reader="A", note='two\nlines, "quoted"')
    put(client, job, "wrong", reader="A", note='two\nlines, "quoted"')
    (shown,) = [review for review in client.get("/v1/reviews").json()["reviews"] if review["job"] == job]
    assert shown == {
        "job": job,
        "model": "tiny-0.0.1",
        "code_version": "test",
        "label": 1,
        "volume_ml": 2.5,
        "peak_score": 0.5,
        "verdict": "wrong",
        "note": 'two\nlines, "quoted"',
        "reader": "A",
        "time": shown["time"],
    }
    exported = client.get("/v1/reviews?format=csv")
    assert exported.headers["content-type"] == "text/csv; charset=utf-8"
    (row,) = [row for row in read_csv(exported.text) if row["job"] == job]
    assert row == {name: str(value) for name, value in shown.items()}
    assert client.get("/v1/reviews?format=xml").status_code == 400
    assert client.get("/v1/reviews?fromat=csv").json()["expected"] == "format."


def test_export_in_several_pages(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    job = finished(client, "pages")
    for number in range(7):
        put(client, job, "right", reader=f"reader {number}")
    whole = client.get("/v1/reviews").json()["reviews"]
    assert len(whole) >= 7
    rows = client.get("/v1/reviews?format=csv").text
    monkeypatch.setattr("app.jobs.reviews.PAGE_ROWS", 3)
    assert client.get("/v1/reviews").json()["reviews"] == whole
    assert client.get("/v1/reviews?format=csv").text == rows
    assert len(read_csv(rows)) == len(whole)


@pytest.mark.parametrize("start", FORMULA_STARTS)
def test_no_cell_of_the_csv_is_a_formula(client: TestClient, start: str) -> None:
    job = finished(client, "formula")
    text = f'{start}HYPERLINK("http://attacker.example")'
    put(client, job, "unsure", note=text, reader=f"{start}A")
    (row,) = [row for row in read_csv(client.get("/v1/reviews?format=csv").text) if row["reader"].endswith(f"{start}A")]
    assert (row["note"], row["reader"]) == (f"'{text}", f"'{start}A")
