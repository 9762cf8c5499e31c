#!/usr/bin/env python3
"""kill -9 at random moments under load: every accepted scan ends with exactly one result, that of a calm run.

    python -m scripts.prove_kill --kills 40
    python -m scripts.prove_kill --kills 40 --database postgresql

One process of the service analyses a steady stream of scans, and is killed and started again; one kill
in four comes while it starts. A sender that got no answer sends again with the same Idempotency-Key.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import httpx2

from app.jobs.store import HELD
from scripts.fleet import Node, digest, every_job, fleet, follow, make_scans, undisturbed
from scripts.servers import postgres

SCANS = 4
# Scans that wait or run at a time: enough that the process is never idle when it is killed.
LOAD = 4
END_SECONDS = 1800


class Sender(threading.Thread):
    """Sends one scan after the other, and keeps what was accepted."""

    def __init__(self, scans: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.scans = scans
        self.node: Node | None = None
        self.accepted: dict[str, int] = {}
        self.ended = threading.Event()
        self.fault: Exception | None = None

    def run(self) -> None:
        """Send until told to end."""
        number = 0
        while not self.ended.is_set():
            try:
                node = self.node
                assert node is not None
                with httpx2.Client(base_url=node.base, timeout=10) as client:
                    waiting = client.get("/v1/scans", params={"state": ["queued", "running"]}).json()["scans"]
                    if len(waiting) >= LOAD:
                        self.ended.wait(0.1)
                        continue
                    answer = client.post(
                        "/v1/scans", content=self.scans[number % SCANS], headers={"Idempotency-Key": f"key-{number}"}
                    )
                if answer.status_code == 202:
                    self.accepted[answer.json()["id"]] = number % SCANS
                    number += 1
            except (httpx2.TransportError, KeyError):
                self.ended.wait(0.1)
            except Exception as error:  # noqa: BLE001  # told by the main thread
                self.fault = error
                return


def prove(folder: Path, kills: int, database: str | None, seed: int) -> bool:
    """Run it, print what happened, and tell whether all is well."""
    rng = random.Random(seed)  # noqa: S311
    scans = make_scans(folder / "scans", SCANS)
    expected = undisturbed(folder / "calm", scans)
    sender = Sender(scans)
    settings = {"database": database} if database else {}
    start = time.monotonic()
    with fleet(folder / "killed", **settings) as killed:
        for number in range(kills):
            node = killed.start("serve")
            sender.node = node
            if not sender.is_alive():
                sender.start()
            if rng.random() < 0.25:
                time.sleep(rng.uniform(0, 5))
            else:
                node.wait_until_ready()
                time.sleep(rng.uniform(0, 5))
            node.kill()
            if sender.fault:
                raise sender.fault
            print(f"kill {number + 1} of {kills}; {len(sender.accepted)} scans accepted", flush=True)
        node = killed.start("serve")
        sender.node = node
        node.wait_until_ready()
        time.sleep(1)
        sender.ended.set()
        sender.join()
        deadline = time.monotonic() + END_SECONDS
        with httpx2.Client(base_url=node.base, timeout=60) as client:
            states = {job: follow(client, job, deadline) for job in sender.accepted}
            every = every_job(client)
            same = sum(
                digest(client, job) == expected[which]
                for job, which in sender.accepted.items()
                if states[job]["state"] == "succeeded"
            )
        left = sorted((folder / "killed" / "store" / "jobs").glob("*/*"))
        results = Counter(path.parts[-2] for path in left if path.name == "results")
        attempts = [path for path in left if path.name.startswith(("work-", HELD))]
    outcomes = Counter(
        (job["problem"] or {}).get("code", job["state"]) if job["problem"] else job["state"] for job in states.values()
    )
    once = sum(results[job] == 1 for job in sender.accepted)
    lost = set(sender.accepted) - set(every)
    print(f"database            {'PostgreSQL' if database else 'SQLite'}")
    print(f"kills               {kills} in {time.monotonic() - start:.0f} s")
    print(f"scans accepted      {len(sender.accepted)}")
    print(f"outcomes            {dict(outcomes)}")
    print(f"identical           {same} of {len(sender.accepted)} to the undisturbed run")
    print(f"with one result     {once} of {len(sender.accepted)}; left-over attempts {len(attempts)}")
    print(f"lost                {len(lost)}; jobs beyond those accepted {len(set(every) - set(sender.accepted))}")
    return same == once == len(sender.accepted) > 0 and not lost and not attempts


def main() -> int:
    """Parse, prove, leave with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    wanted = parser.parse_args()
    server = postgres() if wanted.database == "postgresql" else nullcontext()
    with tempfile.TemporaryDirectory(prefix="counterpart-kill-") as folder, server as url:
        well = prove(Path(folder), wanted.kills, url, wanted.seed)
    print("PROVED" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
