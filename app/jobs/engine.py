"""Analysis engine: the interface between the worker and the inference, and its implementation on bundles.

The inference writes its result into a file, which the export reads: maybe in another process or on another machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from app.analysis import UNPACKED_PREFIX, AnalysisRequest, Progress, export, infer, read_requested_scan
from app.errors import CounterpartError, NoBrainMask, NotReady
from app.export.report import BrainReport, ModelUsed, Report
from app.inference_result import ExtractedBrain, InferenceResult
from app.manifest import FrozenModel, Manifest
from app.pipeline.detect import Detection
from app.pipeline.grid import SliceGrid
from app.pipeline.out_of_distribution import ScanScores
from app.pipeline.preprocess import Slices
from app.runtime.bundle import CARD, GPU_BATCH, Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.selection import check_licence
from app.runtime.session import Provider, check_provider
from app.site_profile import SiteProfile, SiteProfiles
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

    def profiles(self, model: str) -> Sequence[SiteProfile]:
        """Return the site profiles of a model id, for all its scanners."""

    @property
    def settings_key(self) -> str:
        """Return a text of the settings, besides the models, that change results. It is empty for their defaults."""

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
        self._site_profiles = SiteProfiles.model_validate(site_profiles) if site_profiles.get("profiles") else None
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

    def profiles(self, model: str) -> Sequence[SiteProfile]:
        """Return the site profiles of a model id, for all its scanners."""
        loaded = self._site_profiles.profiles if self._site_profiles else ()
        return [profile for profile in loaded if profile.model == model]

    @property
    def settings_key(self) -> str:
        """Return a text of the settings, besides the models, that change results. It is empty for their defaults."""
        parts: list[str] = [] if self._segmentation_type == "binary" else [self._segmentation_type]
        if self._site_profiles:
            parts += sorted(profile.id for profile in self._site_profiles.profiles)
            parts += ["any scanner"] if self._site_profiles.any_scanner else []
        return " ".join(parts)

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


# ---- file of an inference result ---------------------------------------------------------------


class Metadata(FrozenModel):
    """Values in the file that are not arrays."""

    manifest: Manifest
    model: ModelUsed
    brain: BrainReport | None
    no_brain: dict[str, str] | None
    stack_shape: tuple[int, int, int]
    source_shape: tuple[int, int, int]
    background: float
    scale: float
    scan_score: float
    median_kl_range: tuple[tuple[float, float], ...]
    reconstruction: float
    outlier_fraction: float
    reversed: tuple[int, ...]
    seconds: dict[str, float]


def save_inference_result(inference: InferenceResult, path: Path) -> None:
    """Write the result as an uncompressed .npz file without pickled objects."""
    detection, slices = inference.detection, inference.detection.slices
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "metadata": np.frombuffer(_metadata(inference).model_dump_json().encode(), np.uint8),
        "x": slices.x,
        "foreground": slices.foreground,
        "affine": slices.grid.affine,
        "source_affine": slices.grid.source_affine,
        "analysed": detection.analysed,
        "kl": detection.kl,
        "latent_mask": detection.latent_mask,
        "counterpart": detection.counterpart,
        "anomaly": detection.anomaly,
        "slice_scores": detection.scores.slices,
    }
    if isinstance(inference.brain, ExtractedBrain):
        arrays["brain"] = np.packbits(inference.brain.mask)
    with path.open("wb") as file:  # np.savez would append .npz to a path
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub matches the arrays to `allow_pickle`


def load_inference_result(path: Path) -> InferenceResult:
    """Read a file of `save_inference_result`.

    Raises
    ------
    zipfile.BadZipFile
        An array is damaged.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    metadata = Metadata.model_validate_json(arrays["metadata"].tobytes())
    placement = SliceGrid(
        arrays["affine"],
        metadata.stack_shape,
        arrays["source_affine"],
        metadata.source_shape,
        metadata.background,
        metadata.scale,
    )
    detection = Detection(
        slices=Slices(arrays["x"], arrays["foreground"], placement),
        analysed=arrays["analysed"],
        kl=arrays["kl"],
        latent_mask=arrays["latent_mask"],
        counterpart=arrays["counterpart"],
        anomaly=arrays["anomaly"],
        scores=ScanScores(
            metadata.scan_score,
            arrays["slice_scores"],
            metadata.median_kl_range,
            metadata.reconstruction,
            metadata.outlier_fraction,
        ),
        reversed_slices=metadata.reversed,
    )
    brain = _load_brain(metadata, arrays)
    return InferenceResult(metadata.manifest, metadata.model, detection, brain, metadata.seconds)


def _metadata(inference: InferenceResult) -> Metadata:
    scores, placement = inference.detection.scores, inference.detection.slices.grid
    brain = inference.brain
    return Metadata(
        manifest=inference.manifest,
        model=inference.model,
        brain=brain.report if isinstance(brain, ExtractedBrain) else None,
        no_brain=brain.problem if isinstance(brain, CounterpartError) else None,
        stack_shape=placement.shape,
        source_shape=placement.source_shape,
        background=placement.background,
        scale=placement.scale,
        scan_score=scores.scan,
        median_kl_range=scores.median_kl_range,
        reconstruction=scores.reconstruction,
        outlier_fraction=scores.outlier_fraction,
        reversed=inference.detection.reversed_slices,
        seconds=inference.seconds,
    )


def _load_brain(metadata: Metadata, arrays: dict[str, npt.NDArray[np.generic]]) -> ExtractedBrain | NoBrainMask:
    if metadata.brain is None:
        problem = metadata.no_brain or {}
        return NoBrainMask(problem["found"], expected=problem["expected"], advice=problem["advice"])
    count = int(np.prod(metadata.source_shape))
    mask = np.unpackbits(arrays["brain"].astype(np.uint8), count=count)
    return ExtractedBrain(mask.reshape(metadata.source_shape).astype(bool), metadata.brain)
