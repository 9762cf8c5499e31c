"""Analysis engine: the interface between the worker and the inference, and its implementation on bundles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import MappingProxyType
from typing import Any, Protocol

from app.analysis import UNPACKED_PREFIX, AnalysisRequest, Progress, export, infer, read_requested_scan
from app.errors import NotReady
from app.export.report import Report
from app.inference_result import InferenceResult, load_inference_result, save_inference_result
from app.manifest import Manifest
from app.runtime.bundle import CARD, GPU_BATCH, Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.selection import check_licence
from app.runtime.session import Provider, check_provider
from app.site_profile import SiteProfiles
from app.volume import Scan, SegmentationType

# The name of the file that `Engine.infer` writes.
INFERENCE_FILE = "inferred"


class ChildProcessDied(Exception):
    """The child process of the inference ended during a scan.

    Parameters
    ----------
    status : int
        Exit status. A negative number is the signal that ended the process.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"status {status}")


class Engine(Protocol):
    """Inference as the service sees it. Tests have an implementation that writes small files only."""

    @property
    def provider(self) -> Provider:
        """Return the execution provider of the networks, "cpu" or "cuda"."""

    @property
    def manifests(self) -> Sequence[Manifest]:
        """Return the manifests of the installed models."""

    def card(self, model: str) -> str | None:
        """Return the model card of a model id in Markdown, or None if the model has no card."""

    def warm_up(self) -> None:
        """Load every model and run a real inference with it. Raise the first error."""

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Read a scan, run the networks, and write the inference result to `INFERENCE_FILE` in `out`."""

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Write the results of an inference result into the folder `out`.

        If the last call was `infer` on the same engine and folder, the scan and its inference result come from
        memory. Otherwise both files are read again, with the same results.
        """

    def close(self) -> None:
        """Release the loaded models and the last scan."""


@dataclass(frozen=True, eq=False)
class PendingExport:
    """A scan in memory between inference and export, and the folder of its attempt."""

    out: Path
    scratch: TemporaryDirectory[str]
    scan: Scan
    inferred: InferenceResult


def check_engine(engine: Engine) -> None:
    """Check what an engine needs, without loading a model.

    Raises
    ------
    NotReady
        No bundle is installed.
    ProviderUnavailable
        onnxruntime is not installed, or was built without the provider.
    """
    if not engine.manifests:
        raise NotReady(
            "No model bundle is installed.",
            expected="a folder of bundles, each with a manifest.json.",
            advice="Set COUNTERPART_MODELS, or install counterpart with its shipped models.",
        )
    check_provider(engine.provider)


class BundleEngine:
    """Engine for the bundles of one folder. Each bundle is loaded once.

    Parameters
    ----------
    models : path or None
        Folder of bundles. None selects the shipped ones.
    provider : {"cpu", "cuda"}
        Execution provider of the networks.
    threads : int
        Threads of one network evaluation. 0 uses every core.
    noncommercial : bool
        Allow bundles for non-commercial research.
    gpu_batch : int
        See `app.runtime.bundle.load_bundle`.
    segmentation_type : {"binary", "labelmap"}
        Type of the DICOM segmentations.
    site_profiles : dict
        Content of `app.site_profile.SiteProfiles`. The files were checked.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    """

    def __init__(  # noqa: PLR0913 - one for each setting
        self,
        models: str | Path | None,
        provider: Provider,
        threads: int,
        *,
        noncommercial: bool = False,
        gpu_batch: int = GPU_BATCH,
        segmentation_type: SegmentationType = "binary",
        site_profiles: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.provider: Provider = provider
        self._noncommercial = noncommercial
        self._segmentation_type: SegmentationType = segmentation_type
        self._threads = threads
        self._gpu_batch = gpu_batch
        self._site_profiles = SiteProfiles.model_validate(site_profiles)
        folder = Path(models) if models else shipped_models()
        self._folders = {read_manifest(path).id: path for path in find_bundles(folder)}
        self.manifests: Sequence[Manifest] = [read_manifest(path) for path in self._folders.values()]
        self._loaded: dict[str, Bundle] = {}
        self._lock = Lock()
        self._pending: PendingExport | None = None

    def card(self, model: str) -> str | None:
        """Return the model card of a model id in Markdown, or None if the model has no card."""
        path = self._folders[model] / CARD
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def warm_up(self) -> None:
        """Load every permitted bundle, which runs its golden pair.

        Raises
        ------
        NotReady, ProviderUnavailable
            See `check_engine`.
        DamagedBundle
            A bundle cannot be used.
        """
        check_engine(self)
        for manifest in self.manifests:
            if self._noncommercial or not manifest.licence.non_commercial:
                self._bundle(manifest)

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Read a scan, run the networks, and write the inference result to `INFERENCE_FILE` in `out`."""
        self._discard_pending()
        # The unpacked archive lies inside the folder, so that removing the folder removes the archive as well.
        scratch = TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=out)
        try:
            scanned, inferred = infer(scan, Path(scratch.name), self._bundle, self.manifests, request, progress)
            save_inference_result(inferred, out / INFERENCE_FILE)
        except BaseException:
            scratch.cleanup()
            raise
        self._pending = PendingExport(out, scratch, scanned, inferred)

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Write the results of an inference result, from memory if it is the pending one."""
        pending = self._pending
        try:
            if pending is not None and pending.out == out:
                return export(pending.scan, pending.inferred, out, progress, self._segmentation_type)
            progress("export", 0.0)
            with TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=out) as scratch:
                scanned = read_requested_scan(scan, Path(scratch), self.manifests, request)
                return export(scanned, load_inference_result(inferred), out, progress, self._segmentation_type)
        finally:
            self._discard_pending()

    def close(self) -> None:
        """Release the loaded bundles and the last scan."""
        self._discard_pending()
        with self._lock:
            self._loaded.clear()

    def _discard_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.scratch.cleanup()

    def _bundle(self, manifest: Manifest) -> Bundle:
        check_licence(manifest, noncommercial=self._noncommercial)
        with self._lock:
            if manifest.id not in self._loaded:
                folder = self._folders[manifest.id]
                bundle = load_bundle(folder, self.provider, self._threads, self._gpu_batch)
                self._loaded[manifest.id] = replace(bundle, site_profiles=self._site_profiles)
            return self._loaded[manifest.id]
