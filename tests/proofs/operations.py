"""Proof: the operator's steps of docs/operations.md work as they are written.

    python -m tests.proofs.operations
    python -m tests.proofs.operations --shared

Drain, upgrade from an older version, back up, restore elsewhere, and recover from a killed process: on SQLite and a
folder, or with --shared on PostgreSQL and a bucket. The commands come from the document. A line
`<!-- tried: name -->` precedes each of them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.proofs.deployment import (
    CHECKOUT,
    RESULTS,
    Deployment,
    ServiceProcess,
    as_environ,
    deploy,
    list_job_ids,
    make_scans,
    print_row,
    results_digest,
    run_proof,
    submit,
    wait_until_ended,
)
from tests.support.servers import BUCKET, find_postgres, postgres, s3

DOCUMENT = CHECKOUT / "docs" / "operations.md"
# The versions to upgrade from: 0.1.0, which had one process on SQLite, and for --shared the last version without a
# child process for the inference, which had PostgreSQL and buckets.
OLD_VERSION, OLD_SHARED_VERSION = "1e1915c", "692eefd"
# Results of the old versions.
OLD_RESULTS = tuple(name for name in RESULTS if name != "labels.nii.gz")
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Environment:
    """Servers of a deployment: the settings of its processes, and whether they are shared by several machines."""

    shared: bool
    settings: Mapping[str, str]

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        """Arguments of each process. The first one serves the API."""
        return (("serve", "--no-worker"), ("worker",)) if self.shared else (("serve",),)


def run_documented(name: str, folder: Path, environ: Mapping[str, str]) -> None:
    """Run a block of commands of the document."""
    found = re.search(rf"<!-- tried: {name} -->\n+```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    if found is None:
        raise KeyError(f"{DOCUMENT.name} has no block {name}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["/bin/bash", "-euc", found[1]]
    subprocess.run(command, cwd=folder, env={**os.environ, **environ, "PATH": path}, check=True)


def start_all(deployment: Deployment, environment: Environment) -> list[ServiceProcess]:
    """Start every process and wait until it is ready."""
    services = [deployment.start(*command) for command in environment.commands]
    for service in services:
        service.wait_until_ready()
    return services


def drain(services: list[ServiceProcess], folder: Path) -> float:
    """Stop every process as documented, and return the seconds until the last one ended."""
    start = time.monotonic()
    for service in services:
        run_documented("drain", folder, {"PID": str(service.process.pid)})
    for service in services:
        if service.process.wait(TIMEOUT_SECONDS) not in {0, -signal.SIGTERM}:
            raise RuntimeError(f"the process exited with {service.process.returncode}")
    return time.monotonic() - start


def submit_all(service: ServiceProcess, scans: list[bytes], name: str) -> list[str]:
    """Submit all scans and return their jobs."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        return [submit(client, scan, f"{name}-{i}", deadline) for i, scan in enumerate(scans)]


def digests_when_succeeded(
    service: ServiceProcess, jobs: list[str], names: tuple[str, ...] = OLD_RESULTS
) -> list[dict[str, str]]:
    """Return the digests of the jobs' results when all jobs have succeeded."""
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        for job in jobs:
            found = wait_until_ended(client, job, time.monotonic() + TIMEOUT_SECONDS)
            if found["state"] != "succeeded":
                raise RuntimeError(f"{job}: {found['problem']}")
        return [results_digest(client, job, names) for job in jobs]


def check_out(version: str, folder: Path) -> Path:
    """Extract the tree of an older version, and write a bundle of that version into it."""
    folder.mkdir()
    command = ["git", "archive", version]
    archive = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    code = "from pathlib import Path; from tests.support.bundle import write_tiny_bundle as w; w(Path('own'))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=True)
    return folder


def run_steps(folder: Path, live: Environment, fresh: Environment) -> None:
    """Run all steps in the order of a service's life. Raise an error if a step does not work as documented."""
    scans = make_scans(folder / "scans", 3)
    version = OLD_SHARED_VERSION if live.shared else OLD_VERSION
    tree = check_out(version, folder / "old")
    kind = "postgresql" if live.shared else "sqlite"
    with deploy(folder / "a", str(tree), models=str(tree / "own"), drain_seconds="30", **live.settings) as old:
        services = start_all(old, live)
        first = submit_all(services[0], scans, "first")
        before = digests_when_succeeded(services[0], first)
        second = submit_all(services[0], [scan + b"\0" for scan in scans], "second")
        print_row("drain", f"{version}: ended after {drain(services, folder):.1f} s, 3 scans submitted just before")
    with deploy(folder / "a", **live.settings) as new:
        services = start_all(new, live)
        digests_when_succeeded(services[0], second)
        if digests_when_succeeded(services[0], first) != before:
            raise RuntimeError("results of the old version changed")
        print_row("upgrade", "3 results of the old version unchanged, 3 waiting scans succeeded")

        third = submit_all(services[0], scans, "third")
        run_documented(f"backup-{kind}", folder, as_environ(live.settings))
        after_backup = submit_all(services[0], scans[:1], "after the backup")
        digests_when_succeeded(services[0], [*third, *after_backup])
        before += digests_when_succeeded(services[0], third)
        for service in services:
            service.kill()
        print_row("back up", "while 3 scans waited or ran, then one more scan and kill -9")

    if not live.shared:
        shutil.rmtree(live.settings["store"])
    run_documented(f"restore-{kind}", folder, as_environ(fresh.settings))
    with deploy(folder / "b", models=str(folder / "a" / "models"), **fresh.settings) as restored:
        services = start_all(restored, fresh)
        if digests_when_succeeded(services[0], [*first, *third]) != before:
            raise RuntimeError("results changed")
        with httpx2.Client(base_url=services[0].url, timeout=60) as client:
            if set(list_job_ids(client)) != {*first, *second, *third}:
                raise RuntimeError("the jobs are not those of the backup")
        print_row("restore", "elsewhere: 9 jobs, all succeeded, earlier results unchanged")

        fourth = submit_all(services[0], scans, "fourth")
        if fresh.shared:
            services.append(restored.start("worker", scratch=str(folder / "another machine")))
            services[-1].wait_until_ready()
        start = time.monotonic()
        services[1 if fresh.shared else 0].kill()
        if not fresh.shared:
            services = start_all(restored, fresh)
        digests_when_succeeded(services[0], fourth)
        print_row("recover", f"3 scans of a killed worker succeeded after {time.monotonic() - start:.1f} s")
        drain([service for service in services if service.process.poll() is None], folder)


def prove(folder: Path, *, shared: bool = False) -> bool:
    """Start the servers and run all steps. A step that fails raises an error."""
    with ExitStack() as servers:
        if shared:
            url, environ = servers.enter_context(postgres()), servers.enter_context(s3())
            programs = find_postgres()
            assert programs is not None
            # A second database on the same server stands for the server that the backup is restored into.
            subprocess.run([programs / "createdb", f"--maintenance-db={url}", "fresh"], check=True)
            databases = {"live": url, "fresh": url.rpartition("/")[0] + "/fresh"}
            settings = [
                {"database": database, "store": f"s3://{BUCKET}/{name}", "scratch": str(folder / f"scratch-{name}")}
                | environ
                for name, database in databases.items()
            ]
        else:
            settings = [{"store": str(folder / name)} for name in ("live", "fresh")]
        run_steps(folder, *(Environment(shared, each) for each in settings))
    return True


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
