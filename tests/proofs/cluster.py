"""Proof: a cluster whose workers are killed during a burst of scans completes every scan and publishes it once.

    python -m tests.proofs.cluster --scans 200

Two API processes and three workers share PostgreSQL and an S3-compatible server. Every scan of the burst must
succeed with the results of an undisturbed run. The throughput is printed together with that of one worker.
"""

import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import obstore
from obstore.store import S3Store

from tests.proofs.deployment import (
    Deployment,
    ServiceProcess,
    deploy,
    list_job_ids,
    make_scans,
    outcome,
    print_row,
    reference_digests,
    results_digest,
    run_proof,
    submit,
    wait_until_ended,
)
from tests.support.servers import BUCKET, postgres, s3

SCANS = 4
SENDERS = 8
WORKERS = 3
TIMEOUT_SECONDS = 3000


def send_burst(apis: list[ServiceProcess], scans: list[bytes], count: int, name: str) -> dict[str, int]:
    """Submit scans in parallel to all APIs in turn. Return the index of the scan of each job."""
    deadline = time.monotonic() + TIMEOUT_SECONDS

    def send(number: int) -> tuple[str, int]:
        with httpx2.Client(base_url=apis[number % len(apis)].url, timeout=60) as client:
            return submit(client, scans[number % SCANS], f"{name}-{number}", deadline), number % SCANS

    with ThreadPoolExecutor(SENDERS) as pool:
        return dict(pool.map(send, range(count)))


def kill_workers(cluster: Deployment, workers: list[ServiceProcess], kills: int, stopped: threading.Event) -> None:
    """Kill workers at random moments, and start another worker in place of each."""
    rng = random.Random(0)  # noqa: S311
    for _ in range(kills):
        if stopped.wait(rng.uniform(2, 10)):
            return
        workers.pop(rng.randrange(len(workers))).kill()
        workers.append(cluster.start("worker"))


def list_objects(environ: dict[str, str], prefix: str) -> list[str]:
    """Return the names of the objects in the bucket."""
    store = S3Store(
        BUCKET,
        endpoint=environ["AWS_ENDPOINT_URL"],
        region=environ["AWS_REGION"],
        access_key_id=environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True},
    )
    return [entry["path"] for page in obstore.list(store, prefix) for entry in page]


def prove(folder: Path, *, scans: int = 200, kills: int = 6) -> bool:
    """Run the proof, print its table and return whether it holds."""
    contents = make_scans(folder / "scans", SCANS)
    expected = reference_digests(folder / "reference", contents)
    with (
        postgres() as database,
        s3() as environ,
        deploy(
            folder / "cluster",
            database=database,
            store=f"s3://{BUCKET}/proof",
            scratch=str(folder / "cluster" / "scratch"),
            queue_limit=str(scans + 10),
            **environ,
        ) as cluster,
    ):
        apis = [cluster.start("serve", "--no-worker") for _ in range(2)]
        workers = [cluster.start("worker")]
        for service in (*apis, *workers):
            service.wait_until_ready()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with httpx2.Client(base_url=apis[0].url, timeout=60) as client:
            start, first = time.monotonic(), send_burst(apis, contents, max(scans // 10, 2), "first")
            for job in first:
                wait_until_ended(client, job, deadline)
            rate_of_one = len(first) / (time.monotonic() - start)

            workers += [cluster.start("worker") for _ in range(WORKERS - 1)]
            for service in workers:
                service.wait_until_ready()
            stopped = threading.Event()
            killer = threading.Thread(target=kill_workers, args=(cluster, workers, kills, stopped))
            start, burst = time.monotonic(), send_burst(apis, contents, scans, "burst")
            killer.start()
            jobs = {job: wait_until_ended(client, job, deadline) for job in burst}
            rate = len(jobs) / (time.monotonic() - start)
            stopped.set()
            killer.join()
            succeeded = [job for job, found in jobs.items() if found["state"] == "succeeded"]
            identical = sum(results_digest(client, job) == expected[burst[job]] for job in succeeded)
            missing = set(burst) - set(list_job_ids(client))
        killed = sum(service.process.poll() == -9 for service in cluster.processes)
        objects = [name.split("/")[1:] for name in list_objects(environ, "proof/jobs/")]
    published = Counter(parts[1] for parts in objects if parts[2] == "published")
    attempts = Counter(job for job, _ in {(parts[1], parts[2]) for parts in objects if "work-" in parts[2]})
    once = sum(published[job] == 1 for job in burst)
    repeated = sum(attempts[job] > 1 for job in burst)
    print_row("scans", f"{len(burst)} to 2 APIs; {killed} workers killed")
    print_row("outcomes", dict(Counter(map(outcome, jobs.values()))))
    print_row("identical", f"{identical} of {len(burst)} to the undisturbed run")
    print_row("published once", f"{once} of {len(burst)}; {repeated} with the results of more than one attempt")
    print_row("missing", len(missing))
    print_row("throughput", f"{rate:.2f} scans/s with {WORKERS} workers and kills, {rate_of_one:.2f} with one")
    return identical == once == len(burst) and not missing


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
