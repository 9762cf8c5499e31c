"""Helpers for tests of the jobs: a running job service, submitted scans and stored scans."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.analysis import AnalysisRequest
from app.jobs.engine import Engine
from app.jobs.job import State
from app.jobs.maintenance import StorageLimits
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.workflow import JobService
from tests.api.support import fake_scan

JOB = "0123456789abcdef-0123456789abcdef"


def commit_scan(store: Store, job: str, *files: bytes) -> str:
    """Store the files as the scan of a job, and return the digest of the upload."""
    with store.receive_upload() as upload:
        for data in files:
            upload.begin()
            upload.write(data[:3])
            upload.write(data[3:])
            upload.end()
        store.commit_upload(upload, job)
        return upload.digest


def save_intermediate(store: Store, content: bytes) -> str:
    """Save an inference result of the job in a new attempt, and return its name."""
    work = store.create_work_folder(JOB)
    (work / "inferred").write_bytes(content)
    return store.save_intermediate(JOB, work / "inferred")


@contextmanager
def running_service(folder: Path, engine: Engine, queue_limit: int = 100) -> Iterator[JobService]:
    """Run a job service with a store and a SQLite database in a folder."""
    limits = StorageLimits(queue_limit=queue_limit)
    service = JobService(engine, Store(folder), f"sqlite:///{folder}/jobs.sqlite", Metrics(), limits)
    service.start()
    try:
        yield service
    finally:
        service.stop(0)


def submit(service: JobService, folder: Path, **orders: object) -> str:
    """Submit a scan with orders for the fake engine, and return its job."""
    with Store(folder).receive_upload() as upload:
        upload.begin()
        upload.write(fake_scan(**orders))
        upload.end()
        return service.queue.submit(upload, AnalysisRequest(), None)


def wait_for_state(service: JobService, job: str, state: State) -> None:
    """Wait until a job has a state."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if service.queue.get(job).state == state:
            return
        time.sleep(0.03)
    raise AssertionError(f"not {state} in time: {service.queue.get(job)}")


def problem_of(service: JobService, job: str) -> dict[str, str]:
    """Wait until a job has failed, and return its problem."""
    wait_for_state(service, job, "failed")
    problem = service.queue.get(job).problem
    assert problem is not None
    return problem
