"""A store on a disk that is really full: a small file system in memory, which needs root."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.api.service_process import WITH_SUBPROCESS, RunningService, run_service
from tests.api.support import URL, fake_scan, wait_for_state

pytestmark = pytest.mark.proof
MEBIBYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system of 16 MiB can be mounted: run the test as root, outside a container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607


@pytest.fixture
def service(disk: Path, tmp_path: Path) -> Iterator[RunningService]:
    with run_service(disk / "store", tmp_path / "log", WITH_SUBPROCESS, min_free_gb="0") as service:
        yield service


def fill(disk: Path) -> Path:
    """Fill a disk to the last byte, and return the file to remove."""
    path = disk / "filler"
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (MEBIBYTE, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return path


def test_job_that_meets_a_full_disk_succeeds_when_the_disk_has_space(service: RunningService, disk: Path) -> None:
    jobs = [service.http.post(URL, content=fake_scan(seconds=seconds)).json()["id"] for seconds in (4, 1, 0.5)]
    wait_for_state(service.http, jobs[0], "running")
    time.sleep(1)
    filler = fill(disk)
    time.sleep(20)
    assert service.http.get("/readyz").status_code == 503
    assert service.http.get("/livez").status_code == 200
    filler.unlink()
    for job in jobs:
        wait_for_state(service.http, job, "succeeded")
        names = sorted(path.name for path in (disk / "store" / "jobs" / job).iterdir())
        assert names == ["results", "scan"]
    assert service.http.get("/readyz").status_code == 200


def test_scan_is_erased_from_a_full_disk(service: RunningService, disk: Path) -> None:
    scan = fake_scan() + b" " * (2 * MEBIBYTE)
    job = service.http.post(URL, content=scan).json()["id"]
    wait_for_state(service.http, job, "succeeded")
    fill(disk)
    assert service.http.delete(f"{URL}/{job}").status_code == 204
    assert service.http.get(f"{URL}/{job}").status_code == 404
    assert not list(disk.rglob(f"*{job}*"))
