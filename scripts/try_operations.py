#!/usr/bin/env python3
"""The operator's steps of docs/operations.md, each carried out as it is written there.

    python -m scripts.try_operations
    python -m scripts.try_operations --shared

Drain, upgrade from an older version, back up, restore into a fresh place, and recover from a process
that was killed; on SQLite and a folder, or, with --shared, on PostgreSQL and a bucket. The commands are those
of the document: each stands behind a line `<!-- tried: name -->`.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2

from scripts.fleet import CHECKOUT, Fleet, Node, digest, every_job, fleet, follow, make_scans, post
from scripts.servers import BUCKET, find_postgres, postgres, s3

DOCUMENT = CHECKOUT / "docs" / "operations.md"
# What is upgraded from: 0.1.0, which had one process on SQLite; and the last version without a process for
# the inference, which had PostgreSQL and buckets.
OLD_ALONE, OLD_SHARED = "1e1915c", "692eefd"
PATIENCE = 900


@dataclass(frozen=True)
class Place:
    """A deployment: which processes, and the settings that they share."""

    shared: bool
    settings: Mapping[str, str]

    @property
    def roles(self) -> tuple[tuple[str, ...], ...]:
        """What `counterpart` is started with; the first answers."""
        return (("serve", "--no-worker"), ("worker",)) if self.shared else (("serve",),)


def written(name: str, folder: Path, environ: Mapping[str, str]) -> None:
    """Carry out a block of the document."""
    found = re.search(rf"<!-- tried: {name} -->\n+```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    if found is None:
        raise KeyError(f"{DOCUMENT.name} has no block {name}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euc", found[1]], cwd=folder, env={**os.environ, **environ, "PATH": path}, check=True)


def variables(place: Place) -> dict[str, str]:
    """The settings as an operator's shell has them."""
    return {k if k.startswith("AWS_") else f"COUNTERPART_{k.upper()}": v for k, v in place.settings.items()}


def start(version: Fleet, place: Place) -> list[Node]:
    """Start every process, and wait for it."""
    nodes = [version.start(*role) for role in place.roles]
    for node in nodes:
        node.wait_until_ready()
    return nodes


def drain(nodes: list[Node], folder: Path) -> float:
    """Stop every process as the document says; seconds until the last ended."""
    begin = time.monotonic()
    for node in nodes:
        written("drain", folder, {"PID": str(node.process.pid)})
    for node in nodes:
        if node.process.wait(PATIENCE) not in {0, -signal.SIGTERM}:
            raise RuntimeError(f"it ended with {node.process.returncode}")
    return time.monotonic() - begin


def send(node: Node, scans: list[bytes], name: str) -> list[str]:
    """Send them all."""
    with httpx2.Client(base_url=node.base, timeout=60) as client:
        return [post(client, scan, f"{name}-{i}", time.monotonic() + PATIENCE) for i, scan in enumerate(scans)]


def finished(node: Node, jobs: list[str]) -> list[str]:
    """Digests of their results when all have succeeded."""
    with httpx2.Client(base_url=node.base, timeout=60) as client:
        for job in jobs:
            found = follow(client, job, time.monotonic() + PATIENCE)
            if found["state"] != "succeeded":
                raise RuntimeError(f"{job}: {found['problem']}")
        return [digest(client, job) for job in jobs]


def known(node: Node) -> set[str]:
    """Every job that there is."""
    with httpx2.Client(base_url=node.base, timeout=60) as client:
        return set(every_job(client))


def check_out(version: str, folder: Path) -> Path:
    """The tree of an older version, and a bundle of its own in it."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", version], cwd=CHECKOUT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    code = "from pathlib import Path; from tests.support.bundle import write_tiny_bundle as w; w(Path('own'))"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=True)
    return folder


def go(folder: Path, place: Place, fresh: Place) -> None:
    """All steps, in the order in which a service meets them; raises where one does not do what it says."""
    scans = make_scans(folder / "scans", 3)
    version = OLD_SHARED if place.shared else OLD_ALONE
    tree = check_out(version, folder / "old")
    with fleet(folder / "a", str(tree), models=str(tree / "own"), drain_seconds="30", **place.settings) as old:
        nodes = start(old, place)
        first = send(nodes[0], scans, "first")
        before = finished(nodes[0], first)
        second = send(nodes[0], [scan + b"\0" for scan in scans], "second")
        print(f"drain               {version}: ended after {drain(nodes, folder):.1f} s, 3 scans sent just before")
    with fleet(folder / "a", **place.settings) as new:
        nodes = start(new, place)
        finished(nodes[0], second)
        if finished(nodes[0], first) != before:
            raise RuntimeError("results of the old version changed")
        print("upgrade             3 results of the old version unchanged, 3 scans that waited succeeded")

        third = send(nodes[0], scans, "third")
        written("backup-postgresql" if place.shared else "backup-sqlite", folder, variables(place))
        after = send(nodes[0], scans[:1], "after the back-up")
        finished(nodes[0], [*third, *after])
        before += finished(nodes[0], third)
        for node in nodes:
            node.kill()
        print("back up             while 3 scans waited or ran, and one came after it; then kill -9")

    if not place.shared:
        shutil.rmtree(place.settings["store"])
    written("restore-postgresql" if place.shared else "restore-sqlite", folder, variables(fresh))
    with fleet(folder / "b", models=str(folder / "a" / "models"), **fresh.settings) as restored:
        nodes = start(restored, fresh)
        if finished(nodes[0], first) + finished(nodes[0], third) != before:
            raise RuntimeError("results changed")
        if known(nodes[0]) != {*first, *second, *third}:
            raise RuntimeError("other jobs than in the back-up")
        print("restore             in a fresh place: 9 jobs, all succeeded, those with results then unchanged")

        fourth = send(nodes[0], scans, "fourth")
        if fresh.shared:
            nodes.append(restored.start("worker", scratch=str(folder / "another machine")))
            nodes[-1].wait_until_ready()
        begin = time.monotonic()
        nodes[1 if fresh.shared else 0].kill()
        if not fresh.shared:
            nodes = start(restored, fresh)
        finished(nodes[0], fourth)
        print(f"recover             3 scans, their worker killed: succeeded after {time.monotonic() - begin:.1f} s")
        drain([node for node in nodes if node.process.poll() is None], folder)


def main() -> int:
    """Parse, try, leave with 0, or with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpart-operations-") as folder, ExitStack() as servers:
        attempt(Path(folder), servers, shared=wanted.shared)
    print("TRIED")
    return 0


def attempt(folder: Path, servers: ExitStack, *, shared: bool) -> None:
    """Start what is needed, and go."""
    if not shared:
        go(folder, *(Place(False, {"store": str(folder / name)}) for name in ("live", "fresh")))
        return
    url, environ = servers.enter_context(postgres()), servers.enter_context(s3())
    programs = find_postgres()
    assert programs is not None
    # The server that the back-up is restored into: here a second database of the first.
    subprocess.run([programs / "createdb", f"--maintenance-db={url}", "fresh"], check=True)
    places = (
        {"database": base, "store": f"s3://{BUCKET}/{name}", "scratch": str(folder / f"scratch-{name}"), **environ}
        for name, base in (("live", url), ("fresh", url.rpartition("/")[0] + "/fresh"))
    )
    go(folder, *(Place(True, place) for place in places))


if __name__ == "__main__":
    sys.exit(main())
