"""Service process whose engine is normal, is killed before the export, or has no networks.

    python -m tests.jobs.faulty_service {normal,killed,no_networks} [--no-api] [--no-worker]

The analysis times are zero, so that two runs write the same report.
"""

import os
import signal
import sys
from types import SimpleNamespace

from app import analysis
from app.jobs.engine import BundleEngine
from app.jobs.subprocess_engine import SubprocessEngine
from app.main import run_worker, serve
from app.manifest import Manifest
from app.runtime.bundle import Bundle
from app.settings import Settings, read_settings

analysis.time = SimpleNamespace(perf_counter=lambda: 0.0)  # type: ignore[assignment, attr-defined]


class KilledEngine(SubprocessEngine):
    """An engine whose worker is killed at the start of the export."""

    def export(self, *_: object) -> None:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)


class NetworklessEngine(BundleEngine):
    """An engine that cannot load networks."""

    def warm_up(self) -> None:
        pass

    def _bundle(self, manifest: Manifest) -> Bundle:
        raise AssertionError(f"{manifest.id} was loaded")


def make_engine(kind: str, settings: Settings) -> SubprocessEngine:
    arguments = {"models": str(settings.models), "provider": "cpu", "threads": 1}
    local = BundleEngine(settings.models, "cpu", threads=1)
    child = NetworklessEngine if kind == "no_networks" else BundleEngine
    parent = KilledEngine if kind == "killed" else SubprocessEngine
    return parent(local, f"tests.jobs.faulty_service:{child.__name__}", arguments)


if __name__ == "__main__":
    settings = read_settings()
    if "--no-api" in sys.argv:
        run_worker(settings, make_engine(sys.argv[1], settings))
    else:
        serve(settings, make_engine(sys.argv[1], settings), worker="--no-worker" not in sys.argv)
