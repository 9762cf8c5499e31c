"""Clients of the service in `tests.proofs.soak`: good, bad and slow senders and readers, and a latency probe."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from app.jobs.job import ENDED_STATES
from tests.proofs.deployment import URL, outcome

# The number of waiting and running jobs. With this many, the worker is never idle.
LOAD = 3
# The number of ended jobs in the store. The sender erases older ones, so that the store does not grow.
KEPT = 20
# A slow client transfers this many bytes and then pauses for this many seconds.
SLOW_BYTES, PAUSE_SECONDS = 1024, 0.25
SLOW_SECONDS = 30.0
STATUS_CALLS_PER_SECOND = 20

BAD_UPLOADS: tuple[tuple[str, int, bytes, dict[str, str]], ...] = (
    ("empty_upload", 400, b"", {}),
    ("not_an_image_format", 415, b"hello " * 5000, {}),
    ("bad_request", 400, b"no boundary", {"Content-Type": "multipart/form-data; boundary=x"}),
    ("bad_request", 400, b"--x\r\n", {"Content-Type": "multipart/form-data"}),
)


@dataclass
class TrafficLog:
    """Events and failures of all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    cancel_seconds: list[float] = field(default_factory=list)
    release_seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, event: str) -> None:
        """Count an event."""
        with self.lock:
            self.counts[event] += 1

    def expect(self, event: str, found: object, expected: object) -> None:
        """Count an event, and record a failure if the found value is not the expected one."""
        self.add(event)
        if found != expected:
            with self.lock:
                self.failures.append(f"{event}: found {found}, expected {expected}")


class Traffic:
    """All clients of one service, each in its thread.

    Parameters
    ----------
    port : int
        Port on loopback.
    scan : bytes
        A scan that is analysed successfully.
    jobs : Path
        Folder of the service's jobs.
    """

    def __init__(self, port: int, scan: bytes, jobs: Path) -> None:
        self.log = TrafficLog()
        self._jobs = jobs
        self._port = port
        self._scan = scan
        self._stopped = threading.Event()
        self._number = 0
        clients: tuple[Callable[[httpx2.Client], None], ...] = (
            self._submit_and_erase,
            self._send_bad_uploads,
            self._send_damaged_scan,
            self._cancel,
            self._upload_slowly,
            partial(self._upload_slowly, complete=True),
            self._read_slowly,
            self._follow_events,
            self._hang_up,
        )
        self._threads = [threading.Thread(target=self._repeat, args=(client,), daemon=True) for client in clients]

    def warm_up(self, scans: int) -> None:
        """Have some scans analysed, because the memory of a service grows with its first scans."""
        with self._connect() as client:
            for seed in range(scans):
                job = self._submit(client, seed=str(seed))
                while client.get(f"{URL}/{job}").json()["state"] not in ENDED_STATES:
                    time.sleep(0.2)

    def start(self) -> None:
        """Start all clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop all clients after their current calls."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(SLOW_SECONDS + 120)

    def _connect(self) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60)

    def _repeat(self, call: Callable[[httpx2.Client], None]) -> None:
        with self._connect() as client:
            while not self._stopped.is_set():
                try:
                    call(client)
                except Exception as error:  # noqa: BLE001  # a failed call is a finding of the proof
                    self.log.expect("failed calls", repr(error), None)
                    self._stopped.wait(1)

    def _new_key(self) -> dict[str, str]:
        with self.log.lock:
            self._number += 1
            return {"Idempotency-Key": f"soak-{self._number}"}

    def _submit(self, client: httpx2.Client, **query: str) -> str:
        answer = client.post(URL, content=self._scan, headers=self._new_key(), params=query)
        self.log.expect("sent", answer.status_code, 202)
        return str(answer.json()["id"])

    def _ended_jobs(self, client: httpx2.Client) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"state": list(ENDED_STATES), "limit": 200}
        jobs: list[dict[str, Any]] = client.get(URL, params=query).json()["scans"]
        return jobs

    def _submit_and_erase(self, client: httpx2.Client) -> None:
        """Keep the worker busy, check the outcomes of old jobs and erase them."""
        waiting = client.get(URL, params={"state": ["queued", "running"], "limit": 50}).json()["scans"]
        for _ in range(LOAD - len(waiting)):
            self._submit(client)
        for job in self._ended_jobs(client)[KEPT:]:
            ended_as = outcome(job)
            is_expected = ended_as in {"succeeded", "cancelled", "truncated_file"}
            self.log.expect(f"ended as {ended_as}", is_expected, True)
            self.log.expect("erased", client.delete(job["links"]["self"]).status_code, 204)
        self._stopped.wait(0.5)

    def _send_bad_uploads(self, client: httpx2.Client) -> None:
        """Send uploads that are refused while they are received."""
        for code, status, body, headers in BAD_UPLOADS:
            answer = client.post(URL, content=body, headers=headers)
            self.log.expect("bad uploads", (answer.status_code, answer.json()["code"]), (status, code))
            self._stopped.wait(0.5)

    def _send_damaged_scan(self, client: httpx2.Client) -> None:
        """Send half of a scan, which fails when it is read. The priority saves the wait in the queue."""
        headers, query = {**self._new_key(), "Prefer": "wait=120"}, {"priority": "stat"}
        half = self._scan[: len(self._scan) // 2]
        answer = client.post(URL, content=half, headers=headers, params=query, timeout=180)
        self.log.expect("damaged uploads", (answer.status_code, answer.json()["code"]), (422, "truncated_file"))
        self._stopped.wait(5)

    def _cancel(self, client: httpx2.Client) -> None:
        """Cancel a running scan, and measure how soon the worker is free."""
        job = self._submit(client, priority="stat")
        deadline = time.monotonic() + 60
        while client.get(f"{URL}/{job}").json()["state"] == "queued" and time.monotonic() < deadline:
            self._stopped.wait(0.1)
        self._stopped.wait(random.uniform(0, 1))  # noqa: S311
        start = time.monotonic()
        answer = client.post(f"{URL}/{job}/cancel")
        if answer.status_code == 409:
            self.log.add("cancelled too late")
        else:
            self.log.expect("cancelled", client.get(f"{URL}/{job}").json()["state"], "cancelled")
            answered = time.monotonic() - start
            released = wait_until_released(self._jobs / job) - start
            with self.log.lock:
                self.log.cancel_seconds.append(answered)
                self.log.release_seconds.append(released)
        self._stopped.wait(8)

    def _upload_slowly(self, _: httpx2.Client, *, complete: bool = False) -> None:
        """Upload a kilobyte at a time. Close the connection early unless `complete`."""
        slow_part = self._scan[: int(SLOW_SECONDS / PAUSE_SECONDS) * SLOW_BYTES]
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(self._scan)}\r\nConnection: close\r\n"
        key = self._new_key()["Idempotency-Key"]
        with socket.create_connection(("127.0.0.1", self._port), 60) as connection:
            connection.sendall(f"{head}Idempotency-Key: {key}\r\n\r\n".encode())
            for start in range(0, len(slow_part), SLOW_BYTES):
                connection.sendall(slow_part[start : start + SLOW_BYTES])
                if self._stopped.wait(PAUSE_SECONDS):
                    return
            if not complete:
                self.log.add("uploads broken off")
                return
            connection.sendall(self._scan[len(slow_part) :])
            self.log.expect("slow uploads", connection.recv(12), b"HTTP/1.1 202")
            while connection.recv(65536):
                pass

    def _read_slowly(self, client: httpx2.Client) -> None:
        """Read a part of a result slowly, and close the connection early."""
        succeeded = [job for job in self._ended_jobs(client) if job["state"] == "succeeded"]
        if not succeeded:
            self._stopped.wait(1)
            return
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * SLOW_BYTES)
            connection.connect(("127.0.0.1", self._port))
            connection.sendall(f"GET {succeeded[0]['links']['anomaly']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            deadline = time.monotonic() + SLOW_SECONDS
            while time.monotonic() < deadline and not self._stopped.wait(PAUSE_SECONDS):
                if not connection.recv(SLOW_BYTES):
                    break
        self.log.add("slow readers")

    def _follow_events(self, client: httpx2.Client) -> None:
        """Follow the events of a scan to the end."""
        last = ""
        with client.stream("GET", f"{URL}/{self._submit(client)}/events", timeout=300) as answer:
            for line in answer.iter_lines():
                if self._stopped.is_set():
                    return
                last = line if line.startswith("event: ") else last
        self.log.expect("followed to the end", last, "event: end")

    def _hang_up(self, client: httpx2.Client) -> None:
        """Submit a scan, wait for its result, and hang up before it comes."""
        headers = {**self._new_key(), "Prefer": "wait=60"}
        try:
            client.post(URL, content=self._scan, headers=headers, timeout=httpx2.Timeout(60, read=1))
        except httpx2.ReadTimeout:
            self.log.add("hung up")
        self._stopped.wait(20)


def wait_until_released(job_folder: Path, timeout: float = 60.0) -> float:
    """Wait until the worker has removed the work folder of a job, and return the monotonic time."""
    deadline = time.monotonic() + timeout
    while any(job_folder.glob("work-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic()


def measure_latency(port: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of many calls for the state of a job ("status") and for the list of jobs ("list").

    One call in twenty is for the list, whose jobs are used for the next calls. Run this in a separate process.
    """
    taken: dict[str, list[float]] = {"status": [], "list": []}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    rng = random.Random(0)  # noqa: S311
    ids: list[str] = []

    def call(kind: str, path: str) -> Any:
        start = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        taken[kind].append(time.perf_counter() - start)
        return json.loads(body) if answer.status == 200 else None

    start, number = time.monotonic(), -1
    while time.monotonic() - start < seconds:
        number += 1
        if number % STATUS_CALLS_PER_SECOND == 0:
            ids = [job["id"] for job in call("list", f"{URL}?limit=20")["scans"]]
        if ids:
            call("status", f"{URL}/{rng.choice(ids)}")
        time.sleep(max(0.0, start + (number + 1) / STATUS_CALLS_PER_SECOND - time.monotonic()))
    return taken
