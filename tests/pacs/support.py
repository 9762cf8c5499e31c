"""Small DICOM files, a job service without a worker, and a DICOM node inside the test process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry
from pydicom.dataset import FileDataset

from app.analysis import AnalysisRequest
from app.jobs.job import JobFilter
from app.jobs.maintenance import StorageLimits
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.workflow import JobService
from app.pacs.handover import DEFAULT_REQUEST, HandOver
from app.pacs.metrics import NodeMetrics
from app.pacs.spool import Spool
from app.volume import Volume
from tests.api.support import FakeEngine
from tests.support.dicom import Series, make_datasets


def make_slices(name: str = "one", count: int = 4) -> list[FileDataset]:
    """Return the slices of a small series."""
    volume = Volume(np.arange(8 * 8 * count, dtype=np.float32).reshape(8, 8, count), np.diag([2.0, 2.0, 2.0, 1.0]))
    return make_datasets(volume, Series(name=name))


@dataclass
class HandOverCase:
    """A spool and its hand-over, beside a job service whose jobs nobody runs."""

    service: JobService
    store: Store
    spool: Spool
    hand_over: HandOver
    metrics: NodeMetrics

    def restart(self) -> None:
        """Do what a process does that starts after this one died: open the spool again."""
        self.spool.close()
        self.spool = Spool(self.spool.root, 100, 1000)
        self.hand_over = HandOver(self.spool, self.service.queue, self.store, self.metrics, 0.0)

    def jobs(self) -> list[str]:
        """Return the ids of all jobs, in no particular order."""
        return [job.id for job in self.service.queue.list_jobs(JobFilter(), 100, None)]

    def scan(self, job: str) -> list[bytes]:
        """Return the files of a job's scan, sorted."""
        folder = self.store.root / "jobs" / job / "scan"
        return sorted(path.read_bytes() for path in folder.iterdir())


@contextmanager
def hand_over_case(
    folder: Path, queue_limit: int = 100, request: AnalysisRequest = DEFAULT_REQUEST
) -> Iterator[HandOverCase]:
    """Start a job service without a worker, and a hand-over that is not a thread."""
    store = Store(folder / "store")
    limits = StorageLimits(queue_limit=queue_limit)
    service = JobService(FakeEngine(), store, f"sqlite:///{folder}/jobs.sqlite", Metrics(), limits)
    service.start(worker=False)
    metrics = NodeMetrics(CollectorRegistry())
    spool = Spool(store.root / "node", 100, 1000)
    case = HandOverCase(service, store, spool, HandOver(spool, service.queue, store, metrics, 0.0, request), metrics)
    try:
        yield case
    finally:
        case.spool.close()
        service.stop(0)


def read_note(job: str) -> str:
    """Return the note of a job's request."""
    return read_request(job).note


def read_request(job: str) -> AnalysisRequest:
    """Return the request of a job."""
    from dbos import DBOS

    (status,) = DBOS.list_workflows(workflow_ids=[job])
    assert status.input is not None
    return AnalysisRequest(**status.input["args"][1])
