import errno
import json
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from app.export.outputs import REQUIRED_NAMES
from tests.api.support import FakeEngine, scan

URL = "/v1/scans"
WAIT = {"Prefer": "wait=120"}
# Seconds: far more than anything takes here, for machines that are busy with other things.
PATIENCE = 120


def send(client: TestClient, *, wait: bool = True, **orders: object) -> Response:
    return client.post(URL, content=scan(**orders), headers=WAIT if wait else {})


def until(client: TestClient, job: str, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer: dict[str, Any] = client.get(f"{URL}/{job}").json()
        if answer["state"] == state:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"never {state}: {answer}")


def test_a_scan_is_taken_and_finished(client: TestClient) -> None:
    answer = send(client, wait=False, name="happy")
    assert answer.status_code == 202
    job = answer.json()["id"]
    assert answer.headers["location"] == f"{URL}/{job}"
    assert int(answer.headers["retry-after"]) > 0

    done = until(client, job, "succeeded")
    assert done["model"] == "tiny-0.0.1"
    assert done["progress"] == 1.0
    assert done["stage"] is None
    assert done["problem"] is None
    assert done["findings"][0]["centroid_mm"] == [1.0, -2.0, 3.0]
    assert done["lesion_volume_ml"] == 2.5
    assert done["timings"] == {"read": 0.1, "infer": 2.0}
    assert set(done["links"]) == {"self", "events", *(name.partition(".")[0] for name in REQUIRED_NAMES)}
    for link in done["links"].values():
        assert client.get(link).status_code == 200


def test_waiting_answers_with_the_finished_job(client: TestClient) -> None:
    answer = send(client, name="waited", seconds=0.3)
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=120"
    assert answer.json()["state"] == "succeeded"


def test_waiting_too_short_answers_202(client: TestClient) -> None:
    answer = client.post(URL, content=scan(seconds=1.5, name="short"), headers={"Prefer": "respond-async, wait=0"})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers
    job = answer.json()["id"]
    running = until(client, job, "running")
    assert running["links"]["cancel"] == f"{URL}/{job}/cancel"
    until(client, job, "succeeded")


def test_stage_and_progress_are_told(client: TestClient) -> None:
    job = send(client, wait=False, seconds=1.5, name="staged").json()["id"]
    seen = set()
    for _ in range(2000):
        answer = client.get(f"{URL}/{job}").json()
        seen.add((answer["stage"], answer["progress"]))
        if answer["state"] == "succeeded":
            break
        time.sleep(0.02)
    assert "infer" in {stage for stage, _ in seen}
    assert len([progress for _, progress in seen if 0.05 <= progress < 1]) >= 2


def test_the_same_bytes_and_parameters_are_the_same_job(client: TestClient, engine: FakeEngine) -> None:
    first = send(client, name="twice").json()["id"]
    analysed = len(engine.seen)
    assert send(client, name="twice").json()["id"] == first
    assert client.post(URL, files={"file": ("other-name.nii", scan(name="twice"))}).json()["id"] == first
    assert len(engine.seen) == analysed
    assert client.post(f"{URL}?seed=5", content=scan(name="twice"), headers=WAIT).json()["id"] != first
    assert engine.seen[-1][1].seed == 5


def test_two_senders_at_one_moment_get_one_job(client: TestClient, engine: FakeEngine) -> None:
    analysed, ids = len(engine.seen), []
    threads = [
        threading.Thread(target=lambda: ids.append(send(client, name="together").json()["id"])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 1
    assert len(engine.seen) == analysed + 1


def test_a_key_names_its_job(client: TestClient) -> None:
    def post(key: str, **orders: object) -> Response:
        return client.post(URL, content=scan(**orders), headers={"Idempotency-Key": key, **WAIT})

    first = post("key-1", name="keyed")
    assert post("key-1", name="keyed").json()["id"] == first.json()["id"]
    assert post("key-2", name="keyed").json()["id"] != first.json()["id"]
    other = post("key-1", name="another patient")
    assert other.status_code == 409
    assert other.json()["code"] == "idempotency_key_reused"


def test_a_failed_job_tells_why_and_never_answers_again(client: TestClient, engine: FakeEngine) -> None:
    failed = send(client, fail="OutOfDistribution")
    assert failed.status_code == 422
    assert failed.headers["content-type"] == "application/problem+json"
    assert failed.json()["code"] == "out_of_distribution"
    assert failed.json()["advice"] == "Advice."
    job = failed.headers["location"]

    shown = client.get(job)
    assert shown.status_code == 200
    assert shown.json()["state"] == "failed"
    assert shown.json()["problem"] == failed.json()
    for name in REQUIRED_NAMES:
        assert client.get(f"{job}/{name}").status_code == 422
    assert client.post(f"{job}/cancel").status_code == 409

    analysed = len(engine.seen)
    assert send(client, fail="OutOfDistribution").headers["location"] != job
    assert len(engine.seen) == analysed + 1


@pytest.mark.parametrize(
    ("error", "status"), [("TruncatedFile", 422), ("NotAnImageFormat", 422), ("DamagedBundle", 503)]
)
def test_what_only_reading_can_tell_is_422_and_the_services_own_faults_are_not(
    client: TestClient, error: str, status: int
) -> None:
    assert send(client, fail=error).status_code == status


def test_an_unexpected_fault_is_told_without_its_text(client: TestClient) -> None:
    answer = send(client, crash="Zweistein")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error"
    assert "ValueError" in answer.json()["found"]
    assert "Zweistein" not in answer.text
    assert send(client, name="after the crash").status_code == 200


def test_a_job_of_an_older_version_is_still_told(client: TestClient) -> None:
    """0.1.0 knew neither a threshold of the extent nor DICOM results."""
    job = send(client, name="of 0.1.0").json()["links"]["self"]
    path = client.app.state.service.store.root / "jobs" / job.rpartition("/")[2] / "results" / "report.json"  # type: ignore[attr-defined]
    report = json.loads(path.read_text())
    del report["extent_threshold"], report["absent"]
    path.write_text(json.dumps(report))
    told = client.get(job).json()
    assert (told["state"], told["lesion_volume_ml"], told["findings"][0]["label"]) == ("succeeded", 2.5, 1)
    missing = client.get(f"{job}/report.dcm")
    assert (missing.status_code, missing.json()["code"]) == (404, "no_such_result")


def test_results_come_whole_in_parts_and_not_again(client: TestClient) -> None:
    job = send(client, name="ranges").json()["id"]
    url = f"{URL}/{job}/mask.nii.gz"
    whole = client.get(url)
    assert whole.content == b"mask.nii.gz" * 10
    assert whole.headers["content-type"] == "application/gzip"
    assert 'filename="mask.nii.gz"' in whole.headers["content-disposition"]

    head = client.head(url)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == "110"
    assert head.headers["etag"] == whole.headers["etag"]

    part = client.get(url, headers={"Range": "bytes=5-8", "If-Range": whole.headers["etag"]})
    assert part.status_code == 206
    assert part.content == b"nii."
    assert part.headers["content-range"] == "bytes 5-8/110"

    again = client.get(url, headers={"If-None-Match": f'"x", {whole.headers["etag"]}'})
    assert again.status_code == 304
    assert again.content == b""


def test_a_running_job_has_no_result_yet_and_can_be_stopped(client: TestClient) -> None:
    job = send(client, wait=False, seconds=60).json()["id"]
    until(client, job, "running")
    early = client.get(f"{URL}/{job}/mask.nii.gz")
    assert early.status_code == 409
    assert early.json()["code"] == "not_finished"

    start = time.monotonic()
    stopped = client.post(f"{URL}/{job}/cancel")
    assert stopped.json()["state"] == "cancelled"
    assert client.post(f"{URL}/{job}/cancel").status_code == 200
    # The worker notices: the next scan does not wait for the sixty seconds.
    assert send(client, name="after the cancelled").status_code == 200
    assert time.monotonic() - start < 45
    assert client.get(f"{URL}/{job}/mask.nii.gz").status_code == 409
    again = send(client, wait=False, seconds=60).json()["id"]
    assert again != job
    client.delete(f"{URL}/{again}")


def test_a_finished_job_cannot_be_stopped(client: TestClient) -> None:
    job = send(client, name="finished").json()["id"]
    answer = client.post(f"{URL}/{job}/cancel")
    assert answer.status_code == 409
    assert answer.json()["code"] == "already_finished"
    assert client.get(f"{URL}/{job}").json()["state"] == "succeeded"


@pytest.mark.parametrize("state", ["succeeded", "running", "queued"])
def test_an_erased_job_leaves_nothing(client: TestClient, engine: FakeEngine, state: str) -> None:
    blocker = None
    if state == "queued":
        blocker = send(client, wait=False, seconds=60, name="blocker").json()["id"]
        until(client, blocker, "running")
    seconds = 0 if state == "succeeded" else 60
    job = send(client, wait=False, seconds=seconds, name=f"erased {state}").json()["id"]
    until(client, job, state)
    store = client.app.state.service.store.root  # type: ignore[attr-defined]
    assert (store / "jobs" / job).is_dir()

    assert client.delete(f"{URL}/{job}").status_code == 204
    assert not list(store.rglob(f"*{job}*"))
    assert not list((store / "trash").iterdir())
    assert client.get(f"{URL}/{job}").status_code == 404
    assert client.delete(f"{URL}/{job}").status_code == 404
    if blocker:
        client.delete(f"{URL}/{blocker}")
    analysed = len(engine.seen)
    assert send(client, name="after the erased", state=state).status_code == 200
    assert len(engine.seen) == analysed + 1


def test_the_queue_has_places_and_an_end(client: TestClient) -> None:
    jobs = [send(client, wait=False, seconds=60, name=f"queue {i}").json()["id"] for i in range(2)]
    until(client, jobs[0], "running")
    jobs += [send(client, wait=False, name=f"queue {i}").json()["id"] for i in range(2, 5)]
    assert [client.get(f"{URL}/{job}").json()["place"] for job in jobs] == [None, 1, 2, 3, 4]

    full = send(client, wait=False, name="queue 5")
    assert full.status_code == 429
    assert full.json()["code"] == "queue_full"
    assert int(full.headers["retry-after"]) > 0
    for job in jobs:
        assert client.delete(f"{URL}/{job}").status_code == 204


def test_the_list_pages_and_filters(client: TestClient) -> None:
    every = client.get(URL, params={"limit": 200}).json()
    assert every["next"] is None
    ids = [job["id"] for job in every["scans"]]
    assert len(ids) > 10

    seen, page = [], client.get(URL, params={"limit": 3}).json()
    while True:
        seen += [job["id"] for job in page["scans"]]
        if page["next"] is None:
            break
        assert len(page["scans"]) == 3
        page = client.get(page["next"]).json()
    assert seen == ids

    failed = client.get(URL, params={"state": ["failed", "cancelled"]}).json()["scans"]
    assert {job["state"] for job in failed} == {"failed", "cancelled"}
    assert client.get(URL, params={"after": "nonsense"}).json()["code"] == "bad_request"
    assert client.get(URL, params={"state": "asleep"}).status_code == 400


def test_filters_hold_together_and_on_every_page(client: TestClient) -> None:
    # SQLite's clock ticks in whole seconds: what other tests sent before lies under an earlier one.
    start = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    while datetime.now(UTC) < start:
        time.sleep(0.05)
    failed = [send(client, fail="OutOfDistribution", name=f"filtered {i}").headers["location"] for i in range(3)]
    stat = client.post(f"{URL}?priority=stat", content=scan(name="filtered stat"), headers=WAIT).json()["id"]

    def ids(**query: str | int) -> list[str]:
        found: list[str] = []
        page: dict[str, Any] = {"next": f"{URL}?{urlencode(query)}"}
        while page["next"]:
            page = client.get(page["next"]).json()
            found += [job["links"]["self"] for job in page["scans"]]
        return found

    since = start.isoformat()
    assert sorted(ids(code="out_of_distribution", created_after=since, limit=1)) == sorted(failed)
    assert ids(code="out_of_distribution", created_after=since, priority="stat") == []
    assert ids(priority="stat", created_after=since, model="tiny") == [f"{URL}/{stat}"]
    assert len(ids(created_after=since)) == 4
    assert not set(ids(created_before=since, limit=200)) & {*failed, f"{URL}/{stat}"}
    assert ids(model="another") == []
    for bad in ("created_after=2026-11-23T10:00:00", "created_before=yesterday", "priority=now"):
        assert client.get(f"{URL}?{bad}").json()["code"] == "bad_request"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("seed=-1", "bad_request"),
        ("seed=x", "bad_request"),
        ("geometry=guess", "bad_request"),
        ("model=none", "unknown_model"),
    ],
)
def test_bad_parameters_are_refused_before_the_upload(client: TestClient, query: str, code: str) -> None:
    answer = client.post(f"{URL}?{query}", content=scan())
    assert answer.status_code == 400
    assert answer.json()["code"] == code


@pytest.mark.parametrize("model", ["tiny", "tiny-0.0.1"])
def test_a_model_may_be_named(client: TestClient, engine: FakeEngine, model: str) -> None:
    answer = client.post(
        f"{URL}?model={model}&series=1.2.3/2&geometry=resample", content=scan(model=model), headers=WAIT
    )
    assert answer.status_code == 200
    wanted = engine.seen[-1][1]
    assert (wanted.model, wanted.series, wanted.geometry) == (model, "1.2.3/2", "resample")


@pytest.mark.parametrize("path", ["/v1/scans/../../etc", "/v1/scans/x", f"/v1/scans/{'0' * 16}-{'0' * 16}", "/nothing"])
def test_what_is_not_there_is_404(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_the_wrong_method_is_405(client: TestClient) -> None:
    answer = client.put("/v1/models")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert answer.json()["code"] == "method_not_allowed"


def told(client: TestClient, job: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event of a job, to the end of the stream."""
    with client.stream("GET", f"{URL}/{job}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    fields = [dict(line.split(": ", 1) for line in part.splitlines()) for part in text.split("\n\n") if part]
    return [(field["event"], json.loads(field["data"])) for field in fields if "event" in field]


def test_events_tell_what_happens_until_the_end(client: TestClient) -> None:
    blocker = send(client, wait=False, seconds=2, name="ahead of the followed").json()["id"]
    until(client, blocker, "running")
    job = send(client, wait=False, seconds=3, name="followed").json()["id"]
    events = told(client, job)
    assert events[0] == (
        "progress",
        {"state": "queued", "stage": None, "percent": 0.0, "place": 1, "seconds_left": None},
    )
    running = [event for name, event in events if event["state"] == "running"]
    assert running[-1]["stage"] in {"infer", "export"}  # reading is over before anyone looks
    left = [event["seconds_left"] for event in running if event["seconds_left"] is not None]
    assert left
    assert all(0 <= seconds < PATIENCE for seconds in left)
    assert [event["percent"] for event in running] == sorted(event["percent"] for event in running)
    assert events[-1] == (
        "end",
        {"state": "succeeded", "stage": None, "percent": 100.0, "place": None, "seconds_left": None},
    )
    assert [name for name, _ in events].count("end") == 1
    assert told(client, job) == events[-1:]
    assert client.get(f"{URL}/none/events").status_code == 404


def test_events_end_when_the_job_is_erased(client: TestClient) -> None:
    job = send(client, wait=False, seconds=60, name="followed and erased").json()["id"]
    until(client, job, "running")
    threading.Timer(1, lambda: client.delete(f"{URL}/{job}")).start()
    assert told(client, job)[-1] == ("end", {"state": "erased"})


def test_stat_goes_before_what_is_routine(client: TestClient, engine: FakeEngine) -> None:
    blocker = send(client, wait=False, seconds=60, name="before the urgent").json()["id"]
    until(client, blocker, "running")
    routine = send(client, wait=False, name="routine").json()
    stat = client.post(f"{URL}?priority=stat", content=scan(name="stat")).json()
    assert (routine["priority"], stat["priority"]) == ("routine", "stat")
    assert [client.get(f"{URL}/{job['id']}").json()["place"] for job in (stat, routine)] == [1, 2]
    analysed = len(engine.seen)
    client.delete(f"{URL}/{blocker}")
    until(client, routine["id"], "succeeded")
    assert [path.parts[-3] for path, _ in engine.seen[analysed:]] == [stat["id"], routine["id"]]
    assert client.post(f"{URL}?priority=now", content=scan()).json()["code"] == "bad_request"


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        ("bytes=110-", 416, "unsatisfiable_range"),
        ("bytes=9-5", 400, "bad_range"),
        ("lines=1-2", 400, "bad_range"),
        ("nonsense", 400, "bad_range"),
    ],
)
def test_a_bad_range_is_a_problem(client: TestClient, wanted: str, status: int, code: str) -> None:
    job = send(client, name="ranges").json()["id"]
    answer = client.get(f"{URL}/{job}/mask.nii.gz", headers={"Range": wanted})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == code
    assert answer.headers.get("content-range") == ("bytes */110" if status == 416 else None)


def test_too_little_disk_is_507(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr("app.jobs.retention.shutil.disk_usage", lambda _: full)
    answer = send(client, wait=False, name="one too many")
    assert answer.status_code == 507
    assert answer.json()["code"] == "store_full"
    assert int(answer.headers["retry-after"]) > 0


def test_a_disk_that_fills_up_meanwhile_is_507(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.jobs.incoming.Incoming.write", write)
    assert send(client, wait=False, name="half").json()["code"] == "store_full"
