"""The service with real networks, one that is killed between inference and export, and one without networks.

Started as a process of its own: it stops the clock, so that two runs write the same report.
"""

import os
import signal
import sys
from types import SimpleNamespace

from app import analysis
from app.jobs.apart import Apart
from app.jobs.engine import BundleEngine
from app.main import serve, work
from app.manifest import Manifest
from app.runtime.bundle import Bundle
from app.settings import Settings, read_settings

analysis.time = SimpleNamespace(perf_counter=lambda: 0.0)  # type: ignore[assignment, attr-defined]

HERE = "tests.jobs.interrupted"


class Killed(Apart):
    """An engine whose process never comes to the export."""

    def export(self, *_: object) -> None:  # type: ignore[override]
        """Be killed; what was inferred is recorded."""
        os.kill(os.getpid(), signal.SIGKILL)


class Networkless(BundleEngine):
    """An engine that cannot infer."""

    def warm_up(self) -> None:
        """There is nothing to load."""

    def _bundle(self, manifest: Manifest) -> Bundle:
        raise AssertionError(f"the networks of {manifest.id} were asked for")


def made(kind: str, settings: Settings) -> Apart:
    """The engine of a kind."""
    arguments = {"models": str(settings.models), "provider": "cpu", "threads": 1}
    known = BundleEngine(settings.models, "cpu", threads=1)
    make = f"{HERE}:Networkless" if kind == "networkless" else f"{HERE}:BundleEngine"
    return (Killed if kind == "killed" else Apart)(known, make, arguments)


if __name__ == "__main__":
    wanted = read_settings()
    if "--no-api" in sys.argv:
        work(wanted, made(sys.argv[1], wanted))
    else:
        serve(wanted, made(sys.argv[1], wanted), worker="--no-worker" not in sys.argv)
