"""Send, list, show, cancel and erase scans."""

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from app.api.results import RESULT_NAMES
from app.api.upload import Reception
from tests.api.support import URL, WAIT, FakeEngine, fake_scan, send, send_running, wait_for_state


def test_scan_is_accepted_and_finished(client: TestClient) -> None:
    answer = send(client, wait=False, name="happy")
    assert answer.status_code == 202
    job = answer.json()["id"]
    assert answer.headers["location"] == f"{URL}/{job}"
    assert int(answer.headers["retry-after"]) > 0

    done = wait_for_state(client, job, "succeeded")
    assert done["model"] == "tiny-0.0.1"
    assert (done["progress"], done["stage"], done["problem"], done["queue_position"]) == (1.0, None, None, None)
    assert done["findings"][0]["centroid_mm"] == [1.0, -2.0, 3.0]
    assert done["lesion_volume_ml"] == 2.5
    assert done["timings"] == {"read": 0.1, "infer": 2.0}
    maps = {"mask", "labels", "anomaly", "counterpart", "image"}
    assert set(done["links"]) == {"self", "events", "report", "preview", "thumbnail", "reviews"} | maps
    for link in done["links"].values():
        assert client.get(link).status_code == 200


def test_prefer_wait_returns_the_finished_job(client: TestClient) -> None:
    answer = send(client, name="waited", seconds=0.3)
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=120"
    assert answer.json()["state"] == "succeeded"


def test_wait_of_zero_seconds_returns_202(client: TestClient) -> None:
    answer = client.post(URL, content=fake_scan(seconds=1.5, name="short"), headers={"Prefer": "respond-async, wait=0"})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers
    job = answer.json()["id"]
    assert wait_for_state(client, job, "running")["links"]["cancel"] == f"{URL}/{job}/cancel"
    wait_for_state(client, job, "succeeded")


def test_stage_and_progress_are_shown(client: TestClient) -> None:
    job = send(client, wait=False, seconds=1.5, name="staged").json()["id"]
    shown = set()
    for _ in range(2000):
        answer = client.get(f"{URL}/{job}").json()
        shown.add((answer["stage"], answer["progress"]))
        if answer["state"] == "succeeded":
            break
        time.sleep(0.02)
    assert "infer" in {stage for stage, _ in shown}
    assert len([progress for _, progress in shown if 0.05 <= progress < 1]) >= 2


def test_same_bytes_and_parameters_are_the_same_job(client: TestClient, engine: FakeEngine) -> None:
    first = send(client, name="twice").json()["id"]
    analysed = len(engine.inferences)
    assert send(client, name="twice").json()["id"] == first
    assert client.post(URL, files={"file": ("other-name.nii", fake_scan(name="twice"))}).json()["id"] == first
    assert len(engine.inferences) == analysed
    assert send(client, query="?seed=5", name="twice").json()["id"] != first
    assert engine.inferences[-1][1].seed == 5


def test_other_settings_of_the_service_make_another_job(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = send(client, name="settings").json()["id"]
    monkeypatch.setattr(engine, "settings_key", "a site profile")
    second = send(client, name="settings").json()["id"]
    assert second != first
    assert send(client, name="settings").json()["id"] == second


def test_concurrent_senders_get_the_same_job(client: TestClient, engine: FakeEngine) -> None:
    analysed, ids = len(engine.inferences), []
    threads = [
        threading.Thread(target=lambda: ids.append(send(client, name="together").json()["id"])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 1
    assert len(engine.inferences) == analysed + 1


def test_idempotency_key_names_the_job(client: TestClient) -> None:
    def post(key: str, **orders: object) -> Response:
        return client.post(URL, content=fake_scan(**orders), headers={"Idempotency-Key": key, **WAIT})

    first = post("key-1", name="keyed").json()["id"]
    assert post("key-1", name="keyed").json()["id"] == first
    assert post("key-2", name="keyed").json()["id"] != first
    other = post("key-1", name="another patient")
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")


def test_idempotency_key_cannot_be_guessed_from_the_job(client: TestClient) -> None:
    """A key may name a patient, and ids of jobs stand in logs."""
    key = "Zweistein 1955-03-14"
    job = client.post(URL, content=fake_scan(name="secret key"), headers={"Idempotency-Key": key, **WAIT}).json()["id"]
    for text in (key, f"key\0{key}"):
        assert hashlib.sha256(text.encode()).hexdigest()[:16] != job[:16]


def test_idempotency_key_of_an_older_version_still_names_its_job(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post() -> str:
        headers = {"Idempotency-Key": "old key", **WAIT}
        job: str = client.post(URL, content=fake_scan(name="old key"), headers=headers).json()["id"]
        return job

    old = hashlib.sha256(b"key\0old key").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr("app.jobs.idempotency.KeyHasher.hash_key", lambda *_: old)
        job = post()
    assert job.startswith(old[:16])
    assert post() == job


def test_failed_job_has_a_problem_and_is_not_reused(client: TestClient, engine: FakeEngine) -> None:
    failed = send(client, raise_error="OutOfDistribution")
    assert failed.status_code == 422
    assert failed.headers["content-type"] == "application/problem+json"
    assert failed.json()["code"] == "out_of_distribution"
    assert failed.json()["advice"] == "Advice."
    job = failed.headers["location"]

    shown = client.get(job).json()
    assert shown["state"] == "failed"
    assert shown["problem"] == failed.json()
    for name in RESULT_NAMES:
        assert client.get(f"{job}/{name}").status_code == 422
    assert client.post(f"{job}/cancel").status_code == 409

    analysed = len(engine.inferences)
    assert send(client, raise_error="OutOfDistribution").headers["location"] != job
    assert len(engine.inferences) == analysed + 1


# A fault of the service returns the job to the queue: tests/jobs/test_faults.py.
@pytest.mark.parametrize("error", ["TruncatedFile", "NotAnImageFormat"])
def test_fault_of_the_scan_is_422(client: TestClient, error: str) -> None:
    assert send(client, raise_error=error).status_code == 422


def test_unexpected_error_hides_its_text(client: TestClient) -> None:
    answer = send(client, raise_value_error="Zweistein")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "ValueError" in answer.json()["found"]
    assert "Zweistein" not in answer.text
    assert send(client, name="after the error").status_code == 200


def test_running_job_has_no_result_and_can_be_cancelled(client: TestClient) -> None:
    job = send_running(client)
    early = client.get(f"{URL}/{job}/mask.nii.gz")
    assert (early.status_code, early.json()["code"]) == (409, "not_finished")

    start = time.monotonic()
    assert client.post(f"{URL}/{job}/cancel").json()["state"] == "cancelled"
    assert client.post(f"{URL}/{job}/cancel").status_code == 200
    # The worker is free long before the 60 seconds are over.
    assert send(client, name="after the cancelled").status_code == 200
    assert time.monotonic() - start < 45
    assert client.get(f"{URL}/{job}/mask.nii.gz").status_code == 409
    again = send(client, wait=False, seconds=60).json()["id"]
    assert again != job
    client.delete(f"{URL}/{again}")


def test_finished_job_cannot_be_cancelled(client: TestClient) -> None:
    job = send(client, name="finished").json()["id"]
    answer = client.post(f"{URL}/{job}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "already_finished")
    assert client.get(f"{URL}/{job}").json()["state"] == "succeeded"


@pytest.mark.parametrize("state", ["succeeded", "running", "queued"])
def test_erased_job_leaves_no_trace(client: TestClient, engine: FakeEngine, state: str) -> None:
    blocker = send_running(client, name="blocker") if state == "queued" else None
    seconds = 0 if state == "succeeded" else 60
    job = send(client, wait=False, seconds=seconds, name=f"erased {state}").json()["id"]
    wait_for_state(client, job, state)
    store = client.app.state.services.store.root  # type: ignore[attr-defined]
    assert (store / "jobs" / job).is_dir()

    assert client.delete(f"{URL}/{job}").status_code == 204
    assert not list(store.rglob(f"*{job}*"))
    assert not list((store / "trash").iterdir())
    assert client.get(f"{URL}/{job}").status_code == 404
    assert client.delete(f"{URL}/{job}").status_code == 404
    if blocker:
        client.delete(f"{URL}/{blocker}")
    analysed = len(engine.inferences)
    assert send(client, name="after the erased", state=state).status_code == 200
    assert len(engine.inferences) == analysed + 1


def test_queue_has_positions_and_a_limit(client: TestClient) -> None:
    jobs = [send_running(client, name="queue 0")]
    jobs += [send(client, wait=False, name=f"queue {i}").json()["id"] for i in range(1, 5)]
    assert [client.get(f"{URL}/{job}").json()["queue_position"] for job in jobs] == [None, 1, 2, 3, 4]

    refused = send(client, wait=False, name="queue 5")
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    for job in jobs:
        assert client.delete(f"{URL}/{job}").status_code == 204


def test_stat_jobs_start_before_routine_jobs(client: TestClient, engine: FakeEngine) -> None:
    blocker = send_running(client, name="before the urgent")
    routine = send(client, wait=False, name="routine").json()
    stat = send(client, wait=False, query="?priority=stat", name="stat").json()
    assert (routine["priority"], stat["priority"]) == ("routine", "stat")
    assert [client.get(f"{URL}/{job['id']}").json()["queue_position"] for job in (stat, routine)] == [1, 2]
    analysed = len(engine.inferences)
    client.delete(f"{URL}/{blocker}")
    wait_for_state(client, routine["id"], "succeeded")
    assert [path.parts[-3] for path, _ in engine.inferences[analysed:]] == [stat["id"], routine["id"]]


def test_list_has_the_numbers_of_finished_scans(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """No report is read for a list."""
    failed = send(client, name="no numbers", raise_error="OutOfDistribution").headers["location"].rpartition("/")[2]
    done = send(client, name="numbers").json()["id"]
    monkeypatch.setattr("app.api.dependencies.read_report_summary", None)
    shown = {job["id"]: job for job in client.get(URL).json()["scans"]}
    names = ("lesion_volume_ml", "findings_count", "scan_score", "warnings_count")
    assert [shown[done][name] for name in names] == [2.5, 1, 0.5, 0]
    assert [shown[failed][name] for name in names] == [None] * 4
    assert shown[done]["reviews"] == {"right": 0, "wrong": 0, "unsure": 0}
    assert shown[done]["links"]["thumbnail"] == f"{URL}/{done}/thumbnail.png"
    assert "thumbnail" not in shown[failed]["links"]


def list_all(client: TestClient, **query: object) -> list[str]:
    """Return the ids on all pages of a list."""
    ids: list[str] = []
    page: dict[str, Any] = {"next": f"{URL}?{urlencode(query, doseq=True)}"}
    while page["next"]:
        page = client.get(page["next"]).json()
        assert len(page["scans"]) == query.get("limit") or page["next"] is None
        ids += [job["id"] for job in page["scans"]]
    return ids


def test_list_has_pages_and_a_state_filter(client: TestClient) -> None:
    ids = list_all(client, limit=200)
    assert len(ids) > 10
    assert list_all(client, limit=3) == ids
    assert list_all(client, limit=3, order="oldest") == ids[::-1]
    unsuccessful = client.get(URL, params={"state": ["failed", "cancelled"]}).json()["scans"]
    assert {job["state"] for job in unsuccessful} == {"failed", "cancelled"}


def test_all_filters_apply_on_every_page(client: TestClient) -> None:
    # SQLite stores whole seconds, so the jobs of earlier tests must be at least one second older.
    start = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    while datetime.now(UTC) < start:
        time.sleep(0.05)
    failed = [send(client, raise_error="OutOfDistribution", name=f"filtered {i}") for i in range(3)]
    failed_ids = {answer.headers["location"].rpartition("/")[2] for answer in failed}
    stat = send(client, query="?priority=stat", name="filtered stat").json()["id"]

    since = start.isoformat()
    assert set(list_all(client, code="out_of_distribution", created_after=since, limit=1)) == failed_ids
    assert list_all(client, code="out_of_distribution", created_after=since, priority="stat") == []
    assert list_all(client, priority="stat", created_after=since, model="tiny") == [stat]
    assert len(list_all(client, created_after=since)) == 4
    assert not set(list_all(client, created_before=since, limit=200)) & {*failed_ids, stat}
    assert list_all(client, model="another") == []


@pytest.mark.parametrize(
    "query",
    [
        "state=asleep",
        "priority=now",
        "order=best",
        "after=nonsense",
        "created_after=2026-11-23T10:00:00",
        "created_before=yesterday",
    ],
)
def test_invalid_filter_is_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"{URL}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("seed=-1", "bad_request"),
        ("seed=x", "bad_request"),
        ("geometry=guess", "bad_request"),
        ("priority=now", "bad_request"),
        ("model=none", "unknown_model"),
    ],
)
def test_invalid_parameter_is_refused(client: TestClient, query: str, code: str) -> None:
    answer = send(client, query=f"?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, code)


@pytest.mark.parametrize(
    ("query", "nearest"), [("modle=tiny", "model"), ("Seed=1", "seed"), ("wait=60&seed=1", "geometry, model")]
)
def test_unknown_parameter_is_refused_with_the_nearest_name(client: TestClient, query: str, nearest: str) -> None:
    answer = send(client, query=f"?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert answer.json()["expected"].startswith(nearest)
    assert client.get(f"{URL}?{query}").status_code == 400


def test_unknown_parameter_is_not_repeated(client: TestClient) -> None:
    assert "Zweistein" not in client.get(f"{URL}?Zweistein=1").text
    assert client.get(f"{URL}?stat=queued").json()["expected"] == "state."


@pytest.mark.parametrize("model", ["tiny", "tiny-0.0.1"])
def test_parameters_reach_the_engine(client: TestClient, engine: FakeEngine, model: str) -> None:
    assert send(client, query=f"?model={model}&series=1.2.3/2&geometry=resample", model=model).status_code == 200
    request = engine.inferences[-1][1]
    assert (request.model, request.series, request.geometry) == (model, "1.2.3/2", "resample")


@pytest.mark.parametrize("path", ["/v1/scans/../../etc", "/v1/scans/x", f"/v1/scans/{'0' * 16}-{'0' * 16}", "/nothing"])
def test_unknown_path_is_404(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_wrong_method_is_405(client: TestClient) -> None:
    answer = client.put("/v1/models")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, OPTIONS"


def test_scan_is_refused_if_free_disk_space_is_low(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr("app.jobs.maintenance.shutil.disk_usage", lambda _: usage)
    answer = send(client, wait=False, name="one too many")
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")
    assert int(answer.headers["retry-after"]) > 0


def test_free_disk_space_counts_all_uploads_under_way(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another upload has announced bytes that it has not sent yet."""
    usage = shutil.disk_usage("/")._replace(free=2_000_500_000)
    monkeypatch.setattr("app.jobs.maintenance.shutil.disk_usage", lambda _: usage)
    assert send(client, name="alone").status_code == 200
    uploads = client.app.state.services.uploads  # type: ignore[attr-defined]
    other = Reception(None, 10**9)  # type: ignore[arg-type]
    uploads._receptions.add(other)
    try:
        answer = send(client, wait=False, name="beside another")
    finally:
        uploads._receptions.discard(other)
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")


def test_free_disk_space_is_checked_while_bytes_arrive(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=10**9)
    enough = full._replace(free=10**12)

    def send_blocks() -> Iterator[bytes]:
        yield fake_scan(name="long").ljust(400_000)
        monkeypatch.setattr("app.jobs.maintenance.shutil.disk_usage", lambda _: full)
        yield b" " * 400_000

    monkeypatch.setattr("app.jobs.maintenance.shutil.disk_usage", lambda _: enough)
    answer = client.post(URL, content=send_blocks())
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")


def test_disk_that_fills_up_during_the_upload_is_507(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.jobs.store.Upload.write", write)
    answer = send(client, wait=False, name="half")
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")
