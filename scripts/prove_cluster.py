#!/usr/bin/env python3
"""Two API processes and three workers on PostgreSQL and an S3-compatible server: a burst, and workers killed in it.

    python -m scripts.prove_cluster --scans 200

Every scan of the burst must succeed with the results of a calm run, and have one publication and one
attempt's results in the bucket. The throughput is printed against that of one worker.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from scripts.fleet import Fleet, Node, digest, every_job, fleet, follow, make_scans, post, undisturbed
from scripts.servers import BUCKET, list_bucket, postgres, s3

SCANS = 4
SENDERS = 8
WORKERS = 3
END_SECONDS = 3000


def burst(apis: list[Node], scans: list[bytes], count: int, name: str) -> dict[str, int]:
    """Send so many scans at once to all APIs in turn; ids and which scan each is."""
    deadline = time.monotonic() + END_SECONDS

    def send(number: int) -> tuple[str, int]:
        with httpx2.Client(base_url=apis[number % len(apis)].base, timeout=60) as client:
            return post(client, scans[number % SCANS], f"{name}-{number}", deadline), number % SCANS

    with ThreadPoolExecutor(SENDERS) as pool:
        return dict(pool.map(send, range(count)))


def kill_some(cluster: Fleet, workers: list[Node], kills: int, ended: threading.Event) -> None:
    """Kill a worker at random moments, and start another in its place."""
    rng = random.Random(0)  # noqa: S311
    for _ in range(kills):
        if ended.wait(rng.uniform(2, 10)):
            return
        workers.pop(rng.randrange(len(workers))).kill()
        workers.append(cluster.start("worker"))


def prove(folder: Path, count: int, kills: int) -> bool:
    """Run it, print what happened, and tell whether all is well."""
    scans = make_scans(folder / "scans", SCANS)
    expected = undisturbed(folder / "calm", scans)
    with (
        postgres() as database,
        s3() as environ,
        fleet(
            folder / "cluster",
            database=database,
            store=f"s3://{BUCKET}/proof",
            scratch=str(folder / "cluster" / "scratch"),
            queue_limit=str(count + 10),
            **environ,
        ) as cluster,
    ):
        apis = [cluster.start("serve", "--no-worker") for _ in range(2)]
        workers = [cluster.start("worker")]
        for node in (*apis, *workers):
            node.wait_until_ready()
        deadline = time.monotonic() + END_SECONDS
        with httpx2.Client(base_url=apis[0].base, timeout=60) as client:
            start, alone = time.monotonic(), burst(apis, scans, max(count // 10, 2), "alone")
            for job in alone:
                follow(client, job, deadline)
            one = len(alone) / (time.monotonic() - start)

            workers += [cluster.start("worker") for _ in range(WORKERS - 1)]
            for node in workers:
                node.wait_until_ready()
            ended = threading.Event()
            killer = threading.Thread(target=kill_some, args=(cluster, workers, kills, ended))
            start, jobs = time.monotonic(), burst(apis, scans, count, "burst")
            killer.start()
            states = {job: follow(client, job, deadline) for job in jobs}
            many = len(jobs) / (time.monotonic() - start)
            ended.set()
            killer.join()
            good = [job for job, found in states.items() if found["state"] == "succeeded"]
            same = sum(digest(client, job) == expected[jobs[job]] for job in good)
            lost = set(jobs) - set(every_job(client))
        objects = [name.split("/")[1:] for name in list_bucket(environ, "proof/jobs/")]
        published = Counter(parts[1] for parts in objects if parts[2] == "published")
        attempts = Counter(job for job, _ in {(parts[1], parts[2]) for parts in objects if "work-" in parts[2]})
    outcomes = Counter((found["problem"] or {"code": found["state"]})["code"] for found in states.values())
    once = sum(published[job] == 1 for job in jobs)
    print(f"scans               {len(jobs)} to 2 APIs; workers killed {cluster_kills(cluster)}")
    print(f"outcomes            {dict(outcomes)}")
    print(f"identical           {same} of {len(jobs)} to the undisturbed run")
    print(f"published once      {once} of {len(jobs)}; with more than one attempt's results {_more(attempts, jobs)}")
    print(f"lost                {len(lost)}")
    print(f"throughput          {many:.2f} scans/s with {WORKERS} workers and kills, {one:.2f} with one")
    return same == once == len(jobs) and not lost


def cluster_kills(cluster: Fleet) -> int:
    """How many processes ended by SIGKILL."""
    return sum(node.process.poll() == -9 for node in cluster.nodes)


def _more(attempts: Counter[str], jobs: dict[str, int]) -> int:
    return sum(attempts[job] > 1 for job in jobs)


def main() -> int:
    """Parse, prove, leave with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=6)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpart-cluster-") as folder:
        well = prove(Path(folder), wanted.scans, wanted.kills)
    print("PROVED" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
