"""Calibration of a model on healthy scans of one scanner: `counterpart calibrate` (docs/site-calibration.md)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from scipy import ndimage, stats

from app import __version__
from app.analysis import AnalysisRequest, detect_volume, infer
from app.errors import CannotAnalyse, TooFewScans, UnreadableScan, UploadError
from app.export.report import Report
from app.inference_result import ExtractedBrain, InferenceResult
from app.manifest import Manifest, Range, Residual
from app.pipeline.findings import dice
from app.pipeline.risk_control import FACTORS, conformal_threshold, found_volumes, label_at_factors
from app.pipeline.synthetic_lesion import insert_lesion
from app.runtime.bundle import Bundle
from app.site_profile import MIN_SCANS, LesionSensitivity, SiteProfile, Volumes
from app.volume import BoolArray, FloatArray, Scan, Scanner, Volume

# Volumes and contrasts of the inserted lesions, in ml and as a fraction of the brain's intensity range. The scans take
# them in turn.
LESIONS_ML = (2.0, 10.0, 40.0)
CONTRASTS = (0.35, -0.35)
# A scan whose log score is further from the median than this number of standard deviations is left out. The standard
# deviation is estimated from the median absolute deviation (factor 1.4826 for a normal distribution).
OUTLIER_SD = 5.0
MAD_TO_SD = 1.4826
# Smallest spread of the log score: scores that agree by chance must not make outliers of the others.
MIN_LOG_SD = 0.1
# Scores have drifted if the test is significant and the medians differ by more than this ratio, or if a larger share of
# scans is outside the range of the profile.
DRIFT_P_VALUE = 0.01
DRIFT_RATIO = 0.1
MAX_OUTSIDE_SHARE = 0.2
SEED = 20260801
SCAN_SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz", ".zip")


@dataclass(frozen=True, eq=False)
class HealthyScan:
    """Measurements of one healthy scan. No voxel and no name is kept.

    Attributes
    ----------
    model_sha256, model : str
    scanner : Scanner or None
    score : float
        Mean KL over the foreground latents.
    volumes_ml : (41,) ndarray
        False-positive volume at each of `FACTORS`.
    lesion : LesionCurve or None
        None if the brain has no place for the lesion.
    residual : Residual
        Settings of the model.
    """

    model: str
    model_sha256: str
    scanner: Scanner | None
    score: float
    volumes_ml: npt.NDArray[np.float64]
    lesion: "LesionCurve | None"
    residual: Residual


@dataclass(frozen=True, eq=False)
class LesionCurve:
    """Detection of one inserted lesion at each of `FACTORS`.

    Attributes
    ----------
    volume_ml : float
        Intended volume.
    dice : (41,) ndarray
    detected : (41,) ndarray of bool
        A finding overlaps the lesion.
    """

    volume_ml: float
    dice: npt.NDArray[np.float64]
    detected: npt.NDArray[np.bool_]


def list_scans(folder: Path) -> list[Path]:
    """Return the scans of a folder: each file with a known suffix, and each subfolder with the files of one series."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in entries if path.is_dir() or path.name.lower().endswith(SCAN_SUFFIXES)]


def calibrate(
    paths: Sequence[Path],
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: AnalysisRequest,
    target_ml: float,
    on_scan: Callable[[int, str], None],
) -> SiteProfile:
    """Calibrate the thresholds of a model on healthy scans of one scanner.

    Parameters
    ----------
    paths : sequence of Path
        Scans that are believed to be healthy. Each is read as the service would read it.
    bundles, manifests, request
        See `app.analysis.analyse`.
    target_ml : float
        Largest expected false-positive volume of a new healthy scan.
    on_scan : callable
        Called with the index of each scan after its analysis, and with "ok" or the code of the error that refused it.

    Raises
    ------
    TooFewScans
        Fewer than `MIN_SCANS` scans are left, they are of several scanners or models, or no candidate reaches the
        target.
    """
    scans: list[HealthyScan] = []
    excluded: Counter[str] = Counter()
    for index, path in enumerate(paths):
        try:
            scans.append(measure_scan(path, index, bundles, manifests, request))
            on_scan(index, "ok")
        except (CannotAnalyse, UnreadableScan, UploadError) as refusal:
            excluded[refusal.code] += 1
            on_scan(index, refusal.code)
    _check_same((scan.model for scan in scans), "models", "Name the model with --model.")
    _check_same((scan.scanner for scan in scans), "scanners", "Calibrate each scanner in a folder of its own.")
    _check_count(scans, excluded)
    # The service marks a scan outside this range, so the thresholds are those of the scans inside it.
    fitting = score_range([scan.score for scan in scans])
    kept = [scan for scan in scans if fitting.low <= scan.score <= fitting.high]
    excluded["score_outlier"] += len(scans) - len(kept)
    _check_count(kept, excluded)
    return make_profile(kept, fitting, excluded, target_ml)


def measure_scan(
    path: Path,
    index: int,
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: AnalysisRequest,
) -> HealthyScan:
    """Analyse a healthy scan, once unchanged and once with an inserted lesion.

    Parameters
    ----------
    path, bundles, manifests, request
        See `app.analysis.infer`.
    index : int
        Number of the scan. It selects the lesion.
    """
    with TemporaryDirectory() as scratch:
        scan, inference = infer(path, Path(scratch), bundles, manifests, request, _no_progress)
    bundle = bundles(inference.manifest)
    residual = bundle.manifest.residual
    return HealthyScan(
        model=bundle.manifest.id,
        model_sha256=bundle.sha256,
        scanner=scan.source.scanner,
        score=inference.detection.scores.scan,
        volumes_ml=found_volumes(inference.detection, bundle.manifest, scan.volume.voxel_ml),
        lesion=_measure_lesion(scan, inference, bundle, index, request.seed),
        residual=residual,
    )


def score_range(scores: Sequence[float]) -> Range:
    """Return the range of scores that do not differ much from the others, on a logarithmic scale."""
    logs = np.log(scores)
    middle = float(np.median(logs))
    margin = OUTLIER_SD * max(MAD_TO_SD * float(np.median(np.abs(logs - middle))), MIN_LOG_SD)
    return Range(low=_digits(np.exp(middle - margin)), high=_digits(np.exp(middle + margin)))


def make_profile(scans: Sequence[HealthyScan], fitting: Range, excluded: Counter[str], target_ml: float) -> SiteProfile:
    """Return the profile that healthy scans determine.

    Parameters
    ----------
    scans : sequence of HealthyScan
    fitting : Range
        Scores of scans that the profile fits.
    excluded : Counter
        Scans that were left out, by reason.
    target_ml : float

    Raises
    ------
    TooFewScans
        No candidate reaches the target.
    """
    volumes = np.array([scan.volumes_ml for scan in scans])
    chosen = _chosen(volumes, target_ml)
    left_out = [int(_chosen(np.delete(volumes, i, axis=0), target_ml)) for i in range(len(scans))]
    unchanged = int(np.argmin(np.abs(FACTORS - 1.0)))
    residual = scans[0].residual
    return SiteProfile(
        created=datetime.now(UTC).replace(microsecond=0),
        code_version=__version__,
        model=scans[0].model,
        model_sha256=scans[0].model_sha256,
        scanner=scans[0].scanner,
        scans=len(scans),
        excluded=dict(sorted((+excluded).items())),
        target_ml=target_ml,
        threshold=_digits(residual.threshold * FACTORS[chosen]),
        extent_threshold=_digits(residual.extent_threshold * FACTORS[chosen]),
        before=_summarise(volumes[:, unchanged]),
        achieved=_summarise(np.array([row[k] for row, k in zip(volumes, left_out, strict=True)])),
        sensitivity=_sensitivity(scans, unchanged, chosen),
        scan_score=fitting,
        scan_scores=tuple(sorted(_digits(scan.score) for scan in scans)),
        volumes_ml=tuple(sorted(round(float(v), 3) for v in volumes[:, chosen])),
    )


@dataclass(frozen=True)
class Drift:
    """Comparison of later scans with the scans of a site profile.

    Attributes
    ----------
    scans : int
    outside : int
        Scans whose score is outside the range of the profile.
    median_score, calibrated_median_score : float
    median_volume_ml, calibrated_median_volume_ml : float
        Volume of the findings. Later scans may have lesions, so only the score decides.
    p_value : float
        Two-sided Mann-Whitney test that both groups of scores have the same distribution.
    """

    scans: int
    outside: int
    median_score: float
    calibrated_median_score: float
    median_volume_ml: float
    calibrated_median_volume_ml: float
    p_value: float

    @property
    def has_drifted(self) -> bool:
        """True if the scores differ significantly and by more than a tenth, or too many lie outside the range."""
        ratio = self.median_score / self.calibrated_median_score
        differs = self.p_value < DRIFT_P_VALUE and not 1 - DRIFT_RATIO <= ratio <= 1 + DRIFT_RATIO
        return differs or self.outside > MAX_OUTSIDE_SHARE * self.scans


def read_reports(folder: Path, profile: SiteProfile) -> list[Report]:
    """Return the reports (report.json) in a folder and its subfolders that were made with a profile."""
    found = []
    for path in sorted(folder.rglob("report.json")):
        try:
            report = Report.model_validate_json(path.read_bytes())
        except ValidationError:  # written by another version or another program
            continue
        if report.model.site_profile and report.model.site_profile.id == profile.id:
            found.append(report)
    return found


def measure_drift(profile: SiteProfile, reports: Sequence[Report]) -> Drift:
    """Compare the scores of later scans with those of a site profile.

    Raises
    ------
    TooFewScans
        Fewer than `MIN_SCANS` reports were made with the profile.
    """
    if len(reports) < MIN_SCANS:
        raise TooFewScans(
            f"{len(reports)} reports were made with this profile.",
            expected=f"at least {MIN_SCANS}.",
            advice="Give the folder of the results (report.json) of scans that were analysed with the profile.",
        )
    scores = [report.scores.scan for report in reports]
    return Drift(
        scans=len(scores),
        outside=sum(not profile.scan_score.low <= score <= profile.scan_score.high for score in scores),
        median_score=float(np.median(scores)),
        calibrated_median_score=float(np.median(profile.scan_scores)),
        median_volume_ml=float(np.median([report.lesion_volume_ml for report in reports])),
        calibrated_median_volume_ml=float(np.median(profile.volumes_ml)),
        p_value=float(stats.mannwhitneyu(scores, profile.scan_scores).pvalue),
    )


def _no_progress(_stage: str, _fraction: float) -> None:
    """Ignore the progress of one scan."""


def _measure_lesion(
    scan: Scan, inference: InferenceResult, bundle: Bundle, index: int, seed: int | None
) -> LesionCurve | None:
    """Insert a ball into the brain of a healthy scan and detect it at each candidate threshold."""
    volume, brain = analysed_brain(scan, inference)
    size = LESIONS_ML[index % len(LESIONS_ML)]
    contrast = CONTRASTS[index // len(LESIONS_ML) % len(CONTRASTS)]
    ball = _ball(volume, brain, size, np.random.default_rng([SEED, index]))
    if ball is None:
        return None
    changed, truth = insert_lesion(volume.array, brain, ball, volume.spacing, contrast)
    detection = detect_volume(Volume(changed, volume.affine), bundle, seed, _no_progress)
    scores = [
        (dice(labels > 0, truth), bool(labels[truth].any()))
        for labels in label_at_factors(detection, bundle.manifest, volume.voxel_ml)
    ]
    overlaps, hits = zip(*scores, strict=True)
    return LesionCurve(size, np.array(overlaps), np.array(hits))


def analysed_brain(scan: Scan, inference: InferenceResult) -> tuple[Volume, BoolArray]:
    """Return the volume that the pipeline took and its foreground. Outside an extracted brain, the volume is 0.

    For a model of the space inside the skull, the foreground is that space.
    """
    if isinstance(inference.brain, ExtractedBrain):
        mask = inference.brain.mask
        return Volume(np.where(mask, scan.volume.array, np.float32(0)), scan.volume.affine), mask
    slices = inference.detection.slices
    return scan.volume, slices.grid.to_volume(slices.foreground.astype(np.float32)) > 0.5


def _ball(volume: Volume, brain: BoolArray, size_ml: float, rng: np.random.Generator) -> FloatArray | None:
    """Return a ball at a random position inside a brain, (X, Y, Z), or None if it does not fit.

    Its centre is at least half a radius below the surface.
    """
    radius = (size_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    depth = ndimage.distance_transform_edt(brain, sampling=volume.spacing)
    places = np.argwhere(depth > radius / 2)
    if not len(places):
        return None
    centre = places[rng.integers(len(places))]
    axes = np.ogrid[tuple(slice(n) for n in volume.shape)]
    squared = sum(((a - c) * d) ** 2 for a, c, d in zip(axes, centre, volume.spacing, strict=True))
    return np.asarray(squared <= radius**2, dtype=np.float32)


def _chosen(volumes: npt.NDArray[np.float64], target_ml: float) -> int:
    index = conformal_threshold(volumes, target_ml)
    if index is None:
        raise TooFewScans(
            f"No threshold up to {FACTORS[-1]:.0f} times that of the model reaches the target of {target_ml:g} ml.",
            expected="healthy scans that the model finds similar to those of its training.",
            advice="Check that the scans are healthy, add more scans, or set a higher --target-ml.",
        )
    return index


def _sensitivity(scans: Sequence[HealthyScan], unchanged: int, chosen: int) -> tuple[LesionSensitivity, ...]:
    rows = []
    for size in LESIONS_ML:
        curves = [scan.lesion for scan in scans if scan.lesion is not None and scan.lesion.volume_ml == size]
        if curves:
            rows.append(
                LesionSensitivity(
                    volume_ml=size,
                    lesions=len(curves),
                    detected_by_model=sum(bool(curve.detected[unchanged]) for curve in curves),
                    detected=sum(bool(curve.detected[chosen]) for curve in curves),
                    dice_of_model=round(float(np.mean([curve.dice[unchanged] for curve in curves])), 3),
                    dice=round(float(np.mean([curve.dice[chosen] for curve in curves])), 3),
                )
            )
    return tuple(rows)


def _summarise(volumes: npt.NDArray[np.float64]) -> Volumes:
    return Volumes(
        median=round(float(np.median(volumes)), 3),
        percentile_90=round(float(np.percentile(volumes, 90)), 3),
        mean=round(float(volumes.mean()), 3),
        largest=round(float(volumes.max()), 3),
    )


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _check_same(values: Iterable[object], what: str, advice: str) -> None:
    count = len(set(values))
    if count > 1:
        raise TooFewScans(
            f"The scans are of {count} {what}.", expected="scans of one scanner, for one model.", advice=advice
        )


def _check_count(scans: Sequence[HealthyScan], excluded: Counter[str]) -> None:
    if len(scans) < MIN_SCANS:
        reasons = ", ".join(f"{code} {count}" for code, count in sorted((+excluded).items()))
        raise TooFewScans(
            f"{len(scans)} scans can be used" + (f"; left out: {reasons}." if reasons else "."),
            expected=f"at least {MIN_SCANS} healthy scans of one scanner.",
            advice="Add scans of the same scanner and sequence.",
        )
