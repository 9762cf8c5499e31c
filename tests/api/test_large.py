"""An upload as large as is accepted, and larger: the service's memory stays small."""

from collections.abc import Iterator
from pathlib import Path

from tests.api.service_process import run_service
from tests.api.support import fake_scan

MIB = 1 << 20
UPLOAD_MIB = 2048
MOST_MEMORY_MB = 300


def peak_mb(pid: int) -> float:
    """Largest resident memory of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def body(mib: int) -> Iterator[bytes]:
    yield fake_scan().ljust(MIB)
    block = bytes(MIB)
    for _ in range(mib):
        yield block


def test_two_gigabytes_are_received_in_little_memory(tmp_path: Path) -> None:
    with run_service(tmp_path / "store", tmp_path / "log", max_upload_mb=str(UPLOAD_MIB)) as running:
        before = peak_mb(running.process.pid)
        # Refused by its last block: all the others were written, and are gone.
        answer = running.http.post("/v1/scans", content=body(UPLOAD_MIB), timeout=600)
        assert answer.status_code == 413
        assert answer.json()["code"] == "upload_too_large"
        assert before < peak_mb(running.process.pid) < MOST_MEMORY_MB
        assert list((tmp_path / "store" / "incoming").iterdir()) == []
        assert running.http.get("/livez").status_code == 200
