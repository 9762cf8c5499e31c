"""Result of the inference of one scan, in memory or in a file.

The export needs only this result and the scan. Reading the scan again gives the same scan, so
the results have the same bytes if the export runs from memory, from this file, in another process or on another
machine.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.errors import CounterpartError, NoBrainMask
from app.export.report import BrainReport, ModelUsed
from app.manifest import FrozenModel, Manifest
from app.pipeline.detect import Detection
from app.pipeline.grid import SliceGrid
from app.pipeline.preprocess import Slices
from app.pipeline.scores import ScanScores
from app.volume import BoolArray


@dataclass(frozen=True, eq=False)
class ExtractedBrain:
    """Brain that was extracted from a scan with skull.

    Attributes
    ----------
    mask : (X, Y, Z) ndarray of bool
        Brain mask on the scan's own grid.
    report : BrainReport
        Method and measurements.
    """

    mask: BoolArray
    report: BrainReport


@dataclass(frozen=True, eq=False)
class InferenceResult:
    """Result of the networks for one scan.

    Attributes
    ----------
    manifest : Manifest
        Manifest of the model. The export needs its thresholds, not its networks.
    model : ModelUsed
        Description of the model for the report.
    detection : Detection
        Maps and scores on the slices of the model.
    brain : ExtractedBrain or NoBrainMask
        NoBrainMask contains the reason why no brain was extracted.
    seconds : dict of str to float
        Duration of each stage so far.
    """

    manifest: Manifest
    model: ModelUsed
    detection: Detection
    brain: ExtractedBrain | NoBrainMask
    seconds: dict[str, float]


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
