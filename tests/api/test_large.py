"""The memory of the service stays small during an upload of two gigabytes."""

from collections.abc import Iterator
from pathlib import Path

from tests.api.service_process import run_service
from tests.api.support import URL, fake_scan

MIB = 1 << 20
UPLOAD_MIB = 2048
MAX_MEMORY_MB = 300


def peak_mb(pid: int) -> float:
    """Return the largest resident memory of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def body(mib: int) -> Iterator[bytes]:
    yield fake_scan().ljust(MIB)
    block = bytes(MIB)
    for _ in range(mib):
        yield block


def test_two_gigabytes_are_received_in_little_memory(tmp_path: Path) -> None:
    with run_service(tmp_path / "store", tmp_path / "log", max_upload_mb=str(UPLOAD_MIB)) as service:
        before = peak_mb(service.process.pid)
        # The last block exceeds the limit, after all the others have been written.
        answer = service.http.post(URL, content=body(UPLOAD_MIB), timeout=600)
        assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
        assert before < peak_mb(service.process.pid) < MAX_MEMORY_MB
        assert list((tmp_path / "store" / "incoming").iterdir()) == []
        assert service.http.get("/livez").status_code == 200
