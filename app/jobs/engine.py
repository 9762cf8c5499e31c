"""What turns one scan into results, and the models it does it with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Literal, Protocol

from app.analysis import UNPACKED_PREFIX, AnalysisRequest, Progress, export, infer
from app.errors import NotReady
from app.export.report import Report
from app.inference_result import InferenceResult, load_inference_result, save_inference_result
from app.ingest import read
from app.manifest import Manifest
from app.runtime.bundle import CARD, GPU_BATCH, Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.choice import permit
from app.volume import Scan

# What `Engine.infer` writes.
INFERRED = "inferred"


class ProcessDied(Exception):
    """The process that ran the engine ended in the middle of a scan.

    Parameters
    ----------
    status : int
        How: negative where it was a signal.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"status {status}")


class Unexpected(Exception):
    """A fault in another process, which told of it what `app.jobs.runner.where` tells.

    Parameters
    ----------
    place : dict of str
        `exception` and `where`.
    """

    def __init__(self, place: dict[str, str]) -> None:
        super().__init__(place["where"])
        self.place = place


class Engine(Protocol):
    """What the service needs of inference; tests bring one that only writes files."""

    @property
    def provider(self) -> str:
        """Where networks run."""

    @property
    def manifests(self) -> Sequence[Manifest]:
        """The models there are."""

    def card(self, model: str) -> str | None:
        """Model card of a model's id, in Markdown; None where it has none."""

    def warm_up(self) -> None:
        """Load every model and see it work: a real inference; raises what is wrong."""

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Read a scan, ask the networks, and write what they made of it to `INFERRED` in a folder."""

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Write the results of what was inferred, wherever it was, into a folder.

        Where the same engine did it last, for the same folder, it has all it needs in memory.
        """

    def guard(self, *, on: bool) -> None:
        """Whether the next scan may take all memory there is, and the worker with it, or is kept from it."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True, eq=False)
class Last:
    """A scan between inference and export, and the folder of the attempt that it belongs to."""

    out: Path
    scratch: TemporaryDirectory[str]
    scan: Scan
    inferred: InferenceResult


class BundleEngine:
    """The bundles of one folder, each loaded once.

    Parameters
    ----------
    models : path or None
        Folder of bundles; None takes the shipped ones.
    provider : {"cpu", "cuda"}
        Where networks run.
    threads : int
        Of one network evaluation; 0 takes every core.
    noncommercial : bool
        Whether bundles for non-commercial research may be used.
    gpu_batch : int
        As of `app.runtime.bundle.load_bundle`.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    """

    def __init__(
        self,
        models: str | Path | None,
        provider: Literal["cpu", "cuda"],
        threads: int,
        *,
        noncommercial: bool = False,
        gpu_batch: int = GPU_BATCH,
    ) -> None:
        self.provider = provider
        self._noncommercial = noncommercial
        self._threads = threads
        self._gpu_batch = gpu_batch
        self._folder = Path(models) if models else shipped_models()
        self._folders = {read_manifest(path).id: path for path in find_bundles(self._folder)}
        self.manifests: Sequence[Manifest] = [read_manifest(path) for path in self._folders.values()]
        self._loaded: dict[str, Bundle] = {}
        self._lock = Lock()
        self._last: Last | None = None

    def card(self, model: str) -> str | None:
        """Model card of a model's id, in Markdown; None where it has none."""
        path = self._folders[model] / CARD
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def warm_up(self) -> None:
        """Load every bundle that may be used, which runs its golden pair.

        Raises
        ------
        NotReady
            There is no bundle.
        DamagedBundle, ProviderUnavailable
            One cannot be used.
        """
        if not self.manifests:
            raise NotReady(
                "There is no model bundle.",
                expected="a folder of bundles, each with a manifest.json.",
                advice="Set COUNTERPART_MODELS, or install counterpart with its shipped models.",
            )
        for manifest in self.manifests:
            if self._noncommercial or not manifest.licence.non_commercial:
                self._bundle(manifest)

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Read a scan, ask the networks, and write what they made of it to `INFERRED` in a folder."""
        self._forget()
        # Beside it, for what an archive holds: whoever removes the folder removes both.
        scratch = TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=out)
        try:
            scanned, inferred = infer(scan, Path(scratch.name), self._bundle, self.manifests, request, progress)
            save_inference_result(inferred, out / INFERRED)
        except BaseException:
            scratch.cleanup()
            raise
        self._last = Last(out, scratch, scanned, inferred)

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Write the results of what was inferred, from memory where it is there."""
        last = self._last
        try:
            if last is not None and last.out == out:
                return export(last.scan, last.inferred, out, progress)
            progress("export", 0.0)
            with TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=out) as scratch:
                again = read(scan, scratch=Path(scratch), series=request.series, geometry=request.geometry)
                return export(again, load_inference_result(inferred), out, progress)
        finally:
            self._forget()

    def guard(self, *, on: bool) -> None:
        """It cannot: its memory is the worker's."""

    def close(self) -> None:
        """Let go of the loaded bundles, and of the last scan."""
        self._forget()
        with self._lock:
            self._loaded.clear()

    def _forget(self) -> None:
        """Let go of the last scan."""
        last, self._last = self._last, None
        if last is not None:
            last.scratch.cleanup()

    def _bundle(self, manifest: Manifest) -> Bundle:
        permit(manifest, noncommercial=self._noncommercial)
        with self._lock:
            if manifest.id not in self._loaded:
                folder = self._folders[manifest.id]
                self._loaded[manifest.id] = load_bundle(folder, self.provider, self._threads, self._gpu_batch)
            return self._loaded[manifest.id]
