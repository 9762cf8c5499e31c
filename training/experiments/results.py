"""Typed contents of docs/results/*.json."""

from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from training.experiments.metrics import Interval

RowT = TypeVar("RowT")


class Record(BaseModel):
    """Immutable part of a document. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Provenance(Record):
    """Bundle, data and code that results belong to.

    The three hashes of the bundle are those of `training.experiments.manifests`.
    """

    bundle: str
    bundle_sha256: str
    cases_sha256: str
    codes_sha256: str
    detection_sha256: str
    data_sha256: str
    split: str
    split_sha256: str
    seed: int
    code: str
    threads: int


class RunProvenance(Provenance):
    """Provenance of one method's run."""

    total_seconds: float
    training_budget: str = ""


class OodProvenance(Provenance):
    """Provenance of answers of the out-of-distribution check."""

    ood_sha256: str


class Choice(Record):
    """Variant and smoothing of a method's map, chosen on validation cases."""

    variant: str
    smoothing: str


class ScanScores(Record):
    """Scores of every scan. `shipped` is Dice at the shipped threshold."""

    auprc: tuple[float, ...]
    dice: tuple[float, ...]
    truth_pixels: tuple[float, ...]
    shipped: tuple[float, ...] = ()


class Gain(Record):
    """Paired difference in AUPRC and in best-achievable Dice."""

    auprc: Interval
    dice: Interval

    @property
    def is_above_zero(self) -> bool:
        """Both intervals lie above zero."""
        return self.auprc.low > 0 and self.dice.low > 0


class Scores(Record):
    """AUPRC and best-achievable Dice over all cases together."""

    auprc: Interval
    dice: Interval
    cases: int


class MethodScores(Scores):
    """Scores of one method on one kind of case.

    Attributes
    ----------
    mean_scan_auprc, mean_scan_dice : Interval
        Means over scans. Dice is at each scan's own best threshold.
    mean_shipped_dice : Interval, optional
        Mean over scans of Dice at the shipped threshold, for Counterpart.
    lead : Gain, optional
        Counterpart minus this method.
    scans : ScanScores, optional
        For Counterpart.
    """

    mean_scan_auprc: Interval
    mean_scan_dice: Interval
    mean_shipped_dice: Interval | None = None
    lead: Gain | None = None
    scans: ScanScores | None = None


class MethodRun(Record):
    """One method's cost, choice and provenance. `outcome` is its file below docs/results."""

    choice: Choice
    seconds_per_slice: float
    parameters: int
    outcome: str
    provenance: RunProvenance


class SegmentationResults(Record):
    """Experiments 2 and 3: scores by kind of case and method."""

    provenance: Provenance
    kinds: dict[str, dict[str, MethodScores]]
    methods: dict[str, MethodRun]


class KindScores(Record):
    """Image-level scores against healthy images.

    Attributes
    ----------
    auroc, auprc : Interval
        AUROC and AUPRC of the score that was chosen on validation images.
    false_positive_rate : dict of str to float
        False-positive rate for each sensitivity.
    auroc_by_score : dict of str to float
    mean_kl_auroc : Interval, optional
        AUROC of the mean KL over the head, for Counterpart.
    """

    auroc: Interval
    auprc: Interval
    false_positive_rate: dict[str, float]
    images: int
    auroc_by_score: dict[str, float]
    mean_kl_auroc: Interval | None = None


class ReliabilityBin(Record):
    """Images of similar score: mean predicted probability and observed share."""

    images: int
    predicted: float
    observed: Interval


class KindReliability(Record):
    """Calibration of the probability on one kind of image."""

    bins: tuple[ReliabilityBin, ...]
    calibration_error: Interval
    brier: Interval
    fitted_share: float
    share: float


class Reliability(Record):
    """Calibration of the probability that isotonic regression makes of a score."""

    score: str
    kinds: dict[str, KindReliability]


class ImageLevelScores(Record):
    """Image-level scores of one method, by kind of image."""

    score: str
    seconds: float
    kinds: dict[str, KindScores]
    reliability: Reliability | None = None
    provenance: RunProvenance


class ImageLevelResults(Record):
    """Experiment 1."""

    provenance: Provenance
    methods: dict[str, ImageLevelScores]


class OracleScores(Record):
    """Scores of one bundle by grade and step of the oracle ablation."""

    provenance: RunProvenance
    grades: dict[str, dict[str, Scores]]


class PointScores(Scores):
    """Scores of one detection setting, with its cost."""

    views: int
    kl: tuple[int, ...]
    reverse: tuple[int, ...]
    evaluations_per_slice: float
    seconds_per_slice: float
    kl_threshold: float
    code: str


class CurveScores(Record):
    """Scores of one bundle by detection setting. `shipped` is the key of the bundle's own."""

    provenance: Provenance
    shipped: str
    points: dict[str, PointScores]


class LargeLesion(Record):
    """Outcome of one scan with a large lesion: "analysed" or an error code."""

    subject: str
    shape: str
    contrast: float
    truth_ml: float
    outcome: str


class LargeLesionScores(Record):
    """Refusals of scans with a large lesion for one bundle."""

    provenance: OodProvenance
    scans: int
    too_small: int
    refused: int
    share: Interval
    rows: tuple[LargeLesion, ...]


class ChangeScores(Scores):
    """Scores of one change of a bundle, and what it gains over the shipped settings."""

    gain: Gain | None = None


class ThresholdScores(Record):
    """Mean Dice of the mask, by kind, for one rule that makes the thresholds."""

    false_positive_ml: float
    extent_share: float
    threshold: float
    dice: dict[str, Interval]
    shipped: bool


class AblationScores(Record):
    """Scores of one bundle by kind of case and change."""

    provenance: RunProvenance
    kinds: dict[str, dict[str, ChangeScores]]
    thresholds: tuple[ThresholdScores, ...]


class ByBundle(Record, Generic[RowT]):
    """Document with one entry for each bundle."""

    bundles: dict[str, RowT]
