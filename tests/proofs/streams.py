"""Proof: hundreds of open event streams do not slow the other calls down.

    python -m tests.proofs.streams --streams 400

The median of a status call with all streams open must be at most twice the median without them. Meanwhile jobs are
cancelled, so that the queue positions change and every stream gets events.
"""

import selectors
import socket
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx2

from tests.proofs.deployment import URL, deploy, make_scans, print_row, run_proof, submit

JOBS = 60
PAUSE_SECONDS = 0.01
MAX_FACTOR = 2.0


def prove(folder: Path, *, streams: int = 400, calls: int = 400) -> bool:
    """Compare the median of a status call without and with open event streams."""
    (scan,) = make_scans(folder / "scans", 1)
    with deploy(folder / "streams", queue_limit="1000") as deployment:
        service = deployment.start("serve", "--no-worker")
        service.wait_until_ready()
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            jobs = [submit(client, scan, f"stream-{index}", time.monotonic() + 600) for index in range(JOBS)]
            cancelled, followed = jobs[: JOBS // 2], jobs[JOBS // 2 :]
            half = len(cancelled) // 2
            without = measure(client, followed[-1], cancelled[:half], calls)
            with ExitStack() as stack:
                reader = stack.enter_context(Reader(service.port, followed, streams))
                time.sleep(2)
                reader.events = 0
                with_streams = measure(client, followed[-1], cancelled[half:], calls)
    print_row("without streams", f"{without:.1f} ms, median of {calls} status calls")
    print_row("with streams", f"{with_streams:.1f} ms, {streams} streams, {reader.events} events")
    return with_streams <= MAX_FACTOR * without and reader.events >= streams


def measure(client: httpx2.Client, job: str, cancelled: list[str], calls: int) -> float:
    """Return the median of a status call in milliseconds, while jobs ahead are cancelled one after the other."""
    milliseconds = []
    for index in range(calls):
        if index % (calls // len(cancelled)) == 0 and index // (calls // len(cancelled)) < len(cancelled):
            client.post(f"{URL}/{cancelled[index // (calls // len(cancelled))]}/cancel").raise_for_status()
        start = time.perf_counter()
        client.get(f"{URL}/{job}").raise_for_status()
        milliseconds.append(1000 * (time.perf_counter() - start))
        time.sleep(PAUSE_SECONDS)
    return statistics.median(milliseconds)


class Reader:
    """Open event streams, read by one thread that counts the events."""

    def __init__(self, port: int, jobs: list[str], streams: int) -> None:
        self.events = 0
        self._stop = False
        self._selector = selectors.DefaultSelector()
        for index in range(streams):
            connection = socket.create_connection(("127.0.0.1", port), 60)
            request = f"GET {URL}/{jobs[index % len(jobs)]}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            connection.sendall(request.encode())
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]

    def _read(self) -> None:
        while not self._stop:
            for key, _ in self._selector.select(0.2):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                self.events += data.count(b"\nevent: ") + data.startswith(b"event: ")


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
