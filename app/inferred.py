"""What the networks made of a scan, in a file, so that whoever writes the results need not ask them again.

All that the export takes beside the scan itself is in it. Reading the scan again gives the same scan, so that
results have the same bytes whether the export goes on in memory or from this file, in another process or on another
machine.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.errors import CounterpartError, NoBrainMask
from app.export.report import BrainReported, ModelUsed
from app.manifest import FrozenModel, Manifest
from app.pipeline.detect import Detection
from app.pipeline.grid import SliceGrid
from app.pipeline.ood import ScanScores
from app.pipeline.preprocess import Slices
from app.volume import BoolArray


@dataclass(frozen=True, eq=False)
class Taken:
    """A brain that was taken out of its head.

    Attributes
    ----------
    mask : (X, Y, Z) ndarray of bool
        On the scan's own grid.
    reported : BrainReported
        Its numbers.
    """

    mask: BoolArray
    reported: BrainReported


@dataclass(frozen=True, eq=False)
class Inferred:
    """What is known of a scan when the networks have done their part.

    Attributes
    ----------
    manifest : Manifest
        Of the model: the export needs its decisions, not its networks.
    used : ModelUsed
        What the report says of it.
    detection : Detection
    brain : Taken or NoBrainMask
        The latter says why nothing was taken out.
    seconds : dict
        Of each stage so far.
    """

    manifest: Manifest
    used: ModelUsed
    detection: Detection
    brain: Taken | NoBrainMask
    seconds: dict[str, float]


class About(FrozenModel):
    """Everything in the file that is no array."""

    manifest: Manifest
    used: ModelUsed
    brain: BrainReported | None
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


def save(inferred: Inferred, path: Path) -> None:
    """Write it: numpy's arrays, uncompressed, nothing that is executed when it is read."""
    detection, slices, place = inferred.detection, inferred.detection.slices, inferred.detection.slices.grid
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "about": np.frombuffer(_about(inferred).model_dump_json().encode(), np.uint8),
        "x": slices.x,
        "foreground": slices.foreground,
        "affine": place.affine,
        "source_affine": place.source_affine,
        "analysed": detection.analysed,
        "kl": detection.kl,
        "latent_mask": detection.latent_mask,
        "counterpart": detection.counterpart,
        "anomaly": detection.anomaly,
        "slice_scores": detection.scores.slices,
    }
    if isinstance(inferred.brain, Taken):
        arrays["brain"] = np.packbits(inferred.brain.mask)
    with path.open("wb") as file:  # numpy would add an ending to a name
        np.savez(file, **arrays)  # type: ignore[arg-type]  # whose stub takes the arrays for `allow_pickle`


def load(path: Path) -> Inferred:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    about = About.model_validate_json(arrays["about"].tobytes())
    place = SliceGrid(
        arrays["affine"],
        about.stack_shape,
        arrays["source_affine"],
        about.source_shape,
        about.background,
        about.scale,
    )
    scores = ScanScores(
        about.scan_score, arrays["slice_scores"], about.median_kl_range, about.reconstruction, about.outlier_fraction
    )
    detection = Detection(
        slices=Slices(arrays["x"], arrays["foreground"], place),
        analysed=arrays["analysed"],
        kl=arrays["kl"],
        latent_mask=arrays["latent_mask"],
        counterpart=arrays["counterpart"],
        anomaly=arrays["anomaly"],
        scores=scores,
        reversed=about.reversed,
    )
    return Inferred(about.manifest, about.used, detection, _brain(about, arrays), about.seconds)


def _about(inferred: Inferred) -> About:
    scores, place = inferred.detection.scores, inferred.detection.slices.grid
    taken = inferred.brain if isinstance(inferred.brain, Taken) else None
    return About(
        manifest=inferred.manifest,
        used=inferred.used,
        brain=taken.reported if taken else None,
        no_brain=inferred.brain.problem if isinstance(inferred.brain, CounterpartError) else None,
        stack_shape=place.shape,
        source_shape=place.source_shape,
        background=place.background,
        scale=place.scale,
        scan_score=scores.scan,
        median_kl_range=scores.median_kl_range,
        reconstruction=scores.reconstruction,
        outlier_fraction=scores.outlier_fraction,
        reversed=inferred.detection.reversed,
        seconds=inferred.seconds,
    )


def _brain(about: About, arrays: dict[str, npt.NDArray[np.generic]]) -> Taken | NoBrainMask:
    if about.brain is None:
        problem = about.no_brain or {}
        return NoBrainMask(problem["found"], expected=problem["expected"], advice=problem["advice"])
    count = int(np.prod(about.source_shape))
    mask = np.unpackbits(arrays["brain"].astype(np.uint8), count=count)
    return Taken(mask.reshape(about.source_shape).astype(bool), about.brain)
