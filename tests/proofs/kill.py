"""Proof: after kill -9 at random moments under load, every accepted scan has one result, that of an undisturbed run.

    python -m tests.proofs.kill --kills 40
    python -m tests.proofs.kill --kills 40 --database postgresql

One process of the service analyses a steady stream of scans. It is killed and started again, in one of four cases
while it starts. A client that gets no answer submits the scan again with the same Idempotency-Key.
"""

import random
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import httpx2

from app.jobs.store import INTERMEDIATE_PREFIX
from tests.proofs.deployment import (
    URL,
    ServiceProcess,
    deploy,
    differing_parts,
    list_job_ids,
    make_scans,
    outcome,
    print_row,
    reference_digests,
    results_digest,
    run_proof,
    wait_until_ended,
)
from tests.support.servers import postgres

SCANS = 4
# The number of waiting and running jobs. With this many, the process is never idle when it is killed.
LOAD = 4
TIMEOUT_SECONDS = 1800


class Sender(threading.Thread):
    """Submits one scan after the other and keeps the accepted jobs."""

    def __init__(self, scans: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.scans = scans
        self.service: ServiceProcess | None = None
        self.accepted: dict[str, int] = {}
        self.stopped = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        """Submit scans until the event `stopped` is set."""
        number = 0
        while not self.stopped.is_set():
            try:
                assert self.service is not None
                with httpx2.Client(base_url=self.service.url, timeout=10) as client:
                    waiting = client.get(URL, params={"state": ["queued", "running"]}).json()["scans"]
                    if len(waiting) >= LOAD:
                        self.stopped.wait(0.1)
                        continue
                    scan, headers = self.scans[number % SCANS], {"Idempotency-Key": f"key-{number}"}
                    answer = client.post(URL, content=scan, headers=headers)
                if answer.status_code == 202:
                    self.accepted[answer.json()["id"]] = number % SCANS
                    number += 1
            except (httpx2.TransportError, KeyError):
                self.stopped.wait(0.1)
            except Exception as error:  # noqa: BLE001  # raised by the main thread
                self.error = error
                return


def prove(
    folder: Path, *, kills: int = 40, seed: int = 0, database: Literal["sqlite", "postgresql"] = "sqlite"
) -> bool:
    """Run the proof, print its table and return whether it holds."""
    rng = random.Random(seed)  # noqa: S311
    scans = make_scans(folder / "scans", SCANS)
    expected = reference_digests(folder / "reference", scans)
    sender = Sender(scans)
    start = time.monotonic()
    with postgres() if database == "postgresql" else nullcontext() as url:
        settings = {"database": url} if url else {}
        with deploy(folder / "killed", **settings) as deployment:
            for number in range(kills):
                sender.service = service = deployment.start("serve")
                if not sender.is_alive():
                    sender.start()
                if rng.random() >= 0.25:
                    service.wait_until_ready()
                time.sleep(rng.uniform(0, 5))
                service.kill()
                if sender.error:
                    raise sender.error
                print_row(f"kill {number + 1} of {kills}", f"{len(sender.accepted)} scans accepted")
            sender.service = service = deployment.start("serve")
            service.wait_until_ready()
            time.sleep(1)
            sender.stopped.set()
            sender.join()
            deadline = time.monotonic() + TIMEOUT_SECONDS
            with httpx2.Client(base_url=service.url, timeout=60) as client:
                jobs = {job: wait_until_ended(client, job, deadline) for job in sender.accepted}
                known = set(list_job_ids(client))
                differences = {
                    job: differing_parts(results_digest(client, job), expected[scan])
                    for job, scan in sender.accepted.items()
                    if jobs[job]["state"] == "succeeded"
                }
                identical = sum(not parts for parts in differences.values())
            paths = list((folder / "killed" / "store" / "jobs").glob("*/*"))
    results = Counter(path.parts[-2] for path in paths if path.name == "results")
    left_over = [path for path in paths if path.name.startswith(("work-", INTERMEDIATE_PREFIX))]
    accepted = len(sender.accepted)
    with_one_result = sum(results[job] == 1 for job in sender.accepted)
    missing = set(sender.accepted) - known
    print_row("database", database)
    print_row("kills", f"{kills} in {time.monotonic() - start:.0f} s")
    print_row("scans accepted", accepted)
    print_row("outcomes", dict(Counter(map(outcome, jobs.values()))))
    print_row("identical", f"{identical} of {accepted} to the undisturbed run")
    for job, parts in differences.items():
        if parts:
            print_row("differs", f"{job}: {', '.join(parts)}")
    print_row("with one result", f"{with_one_result} of {accepted}; {len(left_over)} left-over files of attempts")
    print_row("missing", f"{len(missing)}; {len(known - set(sender.accepted))} jobs beyond those accepted")
    return identical == with_one_result == accepted > 0 and not missing and not left_over


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
