"""Who calls a service in `scripts.prove_soak`: good, bad and slow senders and readers, and one who measures."""

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

from scripts.fleet import ENDED, URL

# Scans that wait or run at a time: the worker is never idle.
LOAD = 3
# Jobs that ended and are kept, so that the store does not grow: the senders erase the older ones.
KEPT = 20
# A slow client sends or reads so many bytes, and then pauses for so many seconds.
SIP, PAUSE_SECONDS = 1024, 0.25
SLOW_SECONDS = 30.0
# Status calls a second, of the client that measures.
PROBES = 20

BAD: tuple[tuple[str, int, bytes, dict[str, str]], ...] = (
    ("empty_upload", 400, b"", {}),
    ("not_an_image_format", 415, b"hello " * 5000, {}),
    ("bad_request", 400, b"no boundary", {"Content-Type": "multipart/form-data; boundary=x"}),
    ("bad_request", 400, b"--x\r\n", {"Content-Type": "multipart/form-data"}),
)


@dataclass
class Tally:
    """What happened, counted by all threads together."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    cancel_seconds: list[float] = field(default_factory=list)
    let_go_seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str) -> None:
        """Count one more."""
        with self.lock:
            self.counts[what] += 1

    def expect(self, what: str, found: object, expected: object) -> None:
        """Count it, and keep it as a fault where it is not what it should be."""
        self.add(what)
        if found != expected:
            with self.lock:
                self.faults.append(f"{what}: {found} in place of {expected}")


class Traffic:
    """All the clients of one service.

    Parameters
    ----------
    port : int
        Of loopback.
    scan : bytes
        One that is analysed with success.
    jobs : Path
        Where the service keeps them.
    """

    def __init__(self, port: int, scan: bytes, jobs: Path) -> None:
        self.tally = Tally()
        self._jobs = jobs
        self._port = port
        self._scan = scan
        self._ended = threading.Event()
        self._number = 0
        roles: tuple[Callable[[httpx2.Client], None], ...] = (
            self._send,
            self._send_bad,
            self._send_damaged,
            self._cancel,
            self._upload_slowly,
            partial(self._upload_slowly, whole=True),
            self._read_slowly,
            self._follow,
            self._wait_and_hang_up,
        )
        self._threads = [threading.Thread(target=self._play, args=(role,), daemon=True) for role in roles]

    def warm_up(self, scans: int) -> None:
        """Have some scans analysed: a service that has seen none grows with the first, however long they take."""
        with httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60) as client:
            for seed in range(scans):
                job = self._post(client, self._scan, seed=str(seed))
                while client.get(f"{URL}/{job}").json()["state"] not in ENDED:
                    time.sleep(0.2)

    def start(self) -> None:
        """Begin to call."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, each with what it is at."""
        self._ended.set()
        for thread in self._threads:
            thread.join(SLOW_SECONDS + 120)

    def _play(self, role: Callable[[httpx2.Client], None]) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=60) as client:
            while not self._ended.is_set():
                try:
                    role(client)
                except Exception as error:  # noqa: BLE001  # a call that fails is what this looks for
                    self.tally.expect("calls that broke", repr(error), None)
                    self._ended.wait(1)

    def _key(self) -> dict[str, str]:
        with self.tally.lock:
            self._number += 1
            return {"Idempotency-Key": f"soak-{self._number}"}

    def _post(self, client: httpx2.Client, content: bytes, **query: str) -> str:
        answer = client.post(URL, content=content, headers=self._key(), params=query)
        self.tally.expect("sent", answer.status_code, 202)
        return str(answer.json()["id"])

    def _ended_jobs(self, client: httpx2.Client) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = client.get(URL, params={"state": sorted(ENDED), "limit": 200}).json()["scans"]
        return found

    def _send(self, client: httpx2.Client) -> None:
        """Keep the worker busy, look at how it went, and erase what is old."""
        waiting = client.get(URL, params={"state": ["queued", "running"], "limit": 50}).json()["scans"]
        for _ in range(LOAD - len(waiting)):
            self._post(client, self._scan)
        for job in self._ended_jobs(client)[KEPT:]:
            outcome = (job["problem"] or {"code": job["state"]})["code"]
            well = outcome in {"succeeded", "cancelled", "truncated_file"}
            self.tally.expect(f"ended as {outcome}", well, True)
            self.tally.expect("erased", client.delete(job["links"]["self"]).status_code, 204)
        self._ended.wait(0.5)

    def _send_bad(self, client: httpx2.Client) -> None:
        """What is refused while it is received."""
        for code, status, body, headers in BAD:
            answer = client.post(URL, content=body, headers=headers)
            self.tally.expect("bad uploads", (answer.status_code, answer.json()["code"]), (status, code))
            self._ended.wait(0.5)

    def _send_damaged(self, client: httpx2.Client) -> None:
        """What only reading can tell: half of a scan. It goes first, so that it does not wait."""
        headers, query = {**self._key(), "Prefer": "wait=120"}, {"priority": "stat"}
        half = self._scan[: len(self._scan) // 2]
        answer = client.post(URL, content=half, headers=headers, params=query, timeout=180)
        self.tally.expect("damaged uploads", (answer.status_code, answer.json()["code"]), (422, "truncated_file"))
        self._ended.wait(5)

    def _cancel(self, client: httpx2.Client) -> None:
        """Stop a scan in the middle, and see how soon the worker has let go of it."""
        job = self._post(client, self._scan, priority="stat")
        deadline = time.monotonic() + 60
        while client.get(f"{URL}/{job}").json()["state"] == "queued" and time.monotonic() < deadline:
            self._ended.wait(0.1)
        self._ended.wait(random.uniform(0, 1))  # noqa: S311
        start = time.monotonic()
        answer = client.post(f"{URL}/{job}/cancel")
        if answer.status_code == 409:
            self.tally.add("cancelled too late")
        else:
            self.tally.expect("cancelled", client.get(f"{URL}/{job}").json()["state"], "cancelled")
            answered = time.monotonic() - start
            let_go = until_let_go(self._jobs / job) - start
            with self.tally.lock:
                self.tally.cancel_seconds.append(answered)
                self.tally.let_go_seconds.append(let_go)
        self._ended.wait(8)

    def _upload_slowly(self, _: httpx2.Client, *, whole: bool = False) -> None:
        """An upload of a kilobyte now and then, broken off in the end unless `whole`."""
        most = int(SLOW_SECONDS / PAUSE_SECONDS) * SIP
        body = self._scan
        slow = body[:most] if not whole else body
        request = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        key = self._key()["Idempotency-Key"]
        with socket.create_connection(("127.0.0.1", self._port), 60) as wire:
            wire.sendall(f"{request}Idempotency-Key: {key}\r\n\r\n".encode())
            for start in range(0, min(len(slow), most), SIP):
                wire.sendall(slow[start : start + SIP])
                if self._ended.wait(PAUSE_SECONDS):
                    return
            if not whole:
                self.tally.add("uploads broken off")
                return
            wire.sendall(slow[most:])
            self.tally.expect("slow uploads", wire.recv(12), b"HTTP/1.1 202")
            while wire.recv(65536):
                pass

    def _read_slowly(self, client: httpx2.Client) -> None:
        """A result that is read in sips, and left."""
        done = [job for job in self._ended_jobs(client) if job["state"] == "succeeded"]
        if not done:
            self._ended.wait(1)
            return
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * SIP)
            wire.connect(("127.0.0.1", self._port))
            wire.sendall(f"GET {done[0]['links']['anomaly']} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            deadline = time.monotonic() + SLOW_SECONDS
            while time.monotonic() < deadline and not self._ended.wait(PAUSE_SECONDS):
                if not wire.recv(SIP):
                    break
        self.tally.add("slow readers")

    def _follow(self, client: httpx2.Client) -> None:
        """Follow a scan to its end."""
        last = ""
        with client.stream("GET", f"{URL}/{self._post(client, self._scan)}/events", timeout=300) as answer:
            for line in answer.iter_lines():
                if self._ended.is_set():
                    return
                last = line if line.startswith("event: ") else last
        self.tally.expect("followed to the end", last, "event: end")

    def _wait_and_hang_up(self, client: httpx2.Client) -> None:
        """A client that wants to wait for its result, and then does not."""
        try:
            client.post(
                URL,
                content=self._scan,
                headers={**self._key(), "Prefer": "wait=60"},
                timeout=httpx2.Timeout(60, read=1),
            )
        except httpx2.ReadTimeout:
            self.tally.add("hung up")
        self._ended.wait(20)


def until_let_go(job: Path, patience: float = 60.0) -> float:
    """When (monotonic) the worker had removed what it had begun of a job: it does so as the inference has stopped."""
    deadline = time.monotonic() + patience
    while any(job.glob("work-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic()


def probe(port: int, seconds: float) -> dict[str, list[float]]:
    """Ask for the state of jobs again and again, in a process of its own; seconds of each call, by kind.

    Of one in twenty jobs that is asked for, the list is fetched anew, which is measured too.
    """
    found: dict[str, list[float]] = {"status": [], "list": []}
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    rng = random.Random(0)  # noqa: S311
    ids: list[str] = []

    def call(kind: str, path: str) -> Any:
        start = time.perf_counter()
        client.request("GET", path)
        answer = client.getresponse()
        body = answer.read()
        found[kind].append(time.perf_counter() - start)
        return json.loads(body) if answer.status == 200 else None

    begin, number = time.monotonic(), -1
    while time.monotonic() - begin < seconds:
        number += 1
        if number % PROBES == 0:
            ids = [job["id"] for job in call("list", f"{URL}?limit=20")["scans"]]
        if ids:
            call("status", f"{URL}/{rng.choice(ids)}")
        time.sleep(max(0.0, begin + (number + 1) / PROBES - time.monotonic()))
    return found
