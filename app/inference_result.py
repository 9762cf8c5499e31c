"""Result of the inference of one scan. `app.jobs.engine` writes it into a file and reads it.

The export needs only this result and the scan. Reading the scan again gives the same scan, so
the results have the same bytes if the export runs from memory, from this file, in another process or on another
machine.
"""

from dataclasses import dataclass

from app.errors import NoBrainMask
from app.export.report import BrainReport, ModelUsed
from app.manifest import Manifest
from app.pipeline.detect import Detection
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
