"""Stage 4: calibrate every threshold and range of the manifest on the healthy validation subjects."""

import itertools
import json
from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING, Context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import stats
from tqdm import tqdm

from app.manifest import Calibration, KlMap, OodCheck, Range, Residual, Reverse
from app.pipeline.diffusion import Networks, Schedule, encode_view
from app.pipeline.findings import label_findings
from app.pipeline.out_of_distribution import median_kl_ranges, reconstruction_error, solidities, white_matter_contrast
from app.pipeline.scores import latent_mask
from app.volume import BoolArray, FloatArray
from training.augment import simulate_contrast, simulate_scanner
from training.config import Config, parse_config
from training.data import load_scan, load_split
from training.features import (
    ScanFeatures,
    ViewFeatures,
    anomaly_map,
    decode_view,
    extract_features,
    features_of_slices,
    load_exported_networks,
)

# Candidates for the smallest connected component of a latent mask.
COMPONENT_SIZES = range(1, 40)
# Percentiles of the KL of healthy latents. The out-of-distribution check counts the latents outside them.
LATENT_PERCENTILES = (0.1, 99.9)
# Percentiles of the mean KL of healthy slices. The report shows them, and the out-of-distribution check can use them
# (`max_outlier_slice_fraction`).
SLICE_PERCENTILES = (0.5, 99.5)
# Percentile of the solidity of healthy slices below which a scan is refused. A scan is judged by its median slice, so
# that only single slices of the lowest part of a brain come near it.
SOLIDITY_PERCENTILE = 2.0
# Random streams of the simulated scanners, in addition to the seed of the configuration: those of the
# out-of-distribution check, which keep the contrast, and those of the threshold of the anomaly map.
SCANNER_STREAM = 6
CONTRAST_STREAM = 9
# Range of the reconstruction error if latents are pixels: rounding only.
NO_LOSS = Range(low=0.0, high=1e-3)
# Halvings of a threshold's range: finer than the digits that are stored.
BISECTIONS = 20


def kl_threshold(scans: list[ScanFeatures], percentile: float) -> float:
    """Return a percentile of the KL over the foreground latents of healthy scans."""
    return float(np.percentile(np.concatenate([s.foreground_kl for s in scans]), percentile))


def smallest_component(scans: list[ScanFeatures], threshold: float, empty_fraction: float) -> int:
    """Return the smallest component size that leaves enough healthy slices with an empty latent mask.

    Raises
    ------
    SystemExit
        No candidate size is large enough.
    """
    for size in COMPONENT_SIZES:
        empty = [~mask_latents(s.identity, threshold, size, 0).any(axis=(1, 2)) for s in scans]
        if np.concatenate(empty).mean() >= empty_fraction:
            return size
    raise SystemExit(
        f"Without components of fewer than {COMPONENT_SIZES[-1]} latents, too few healthy slices have an empty mask. "
        f"Expected {empty_fraction:.0%}. Raise kl_percentile or lower empty_slice_fraction."
    )


def mask_latents(view: ViewFeatures, threshold: float, min_component: int, grow: int) -> BoolArray:
    """Return the latent mask of one view, (M, h, w)."""
    return latent_mask(view.kl, view.encoded.foreground_latents, threshold, min_component, grow)


def round_significant(value: float) -> float:
    """Round to six significant digits. More would suggest a precision that a calibration does not have."""
    return float(f"{value:.6g}")


def round_up_significant(value: float) -> float:
    """Round up to six significant digits. A threshold that is rounded up lets nothing more through."""
    return float(Context(prec=6, rounding=ROUND_CEILING).create_decimal(repr(value)))


def make_range(low: float, high: float) -> Range:
    """Return a range of the manifest with rounded ends."""
    return Range(low=round_significant(low), high=round_significant(high))


def prediction_interval(values: npt.NDArray[np.float64], outside: float) -> Range:
    """Return the range that contains the score of a new healthy scan on a new scanner, except for a share `outside`.

    Prediction interval of a one-way layout on logarithms, because scores are positive and skewed. The variances between
    subjects and between scanners add up (Searle, Casella & McCulloch 1992, chapter 3), and Student's t uses the degrees
    of freedom of their sum (Satterthwaite 1946).

    Parameters
    ----------
    values : (subjects, scanners) ndarray
    outside : float
    """
    logs = np.log(values)
    n, scanners = logs.shape
    subject_mean_square = scanners * logs.mean(axis=1).var(ddof=1)
    within = logs.var(axis=1, ddof=1).mean() if scanners > 1 else 0.0
    variances = np.array([subject_mean_square / scanners, within * (scanners - 1) / scanners])
    degrees = variances.sum() ** 2 / (variances**2 / [n - 1, max(n * (scanners - 1), 1)]).sum()
    # The second term: the mean is estimated from n subjects.
    sd = np.sqrt(variances.sum() + subject_mean_square / (n * scanners))
    margin = stats.t.ppf(1 - outside / 2, degrees) * sd
    return make_range(np.exp(logs.mean() - margin), np.exp(logs.mean() + margin))


def calibrate_ood(scans: list[ScanFeatures], networks: Networks, config: Config) -> OodCheck:
    """Calibrate the out-of-distribution check. All scores together refuse the configured share of healthy scans."""
    detection = config.detection
    low, high = np.percentile(np.concatenate([scan.foreground_kl for scan in scans]), LATENT_PERCENTILES)
    # (subjects, scanners, time steps + 1, 2): the smallest and the largest value of each score in a scan.
    scores = np.array(
        [_scanner_scores(scan, i, networks, config) for i, scan in enumerate(tqdm(scans, desc="scanners"))]
    )
    outside = detection.ood_refused_share / scores.shape[2]
    # The check asks whether two ranges overlap. The low end therefore comes from the largest values of healthy scans,
    # and the high end from the smallest.
    ranges = [
        make_range(prediction_interval(score[..., 1], outside).low, prediction_interval(score[..., 0], outside).high)
        for score in np.moveaxis(scores[:, :, :-1], 2, 0)
    ]
    errors = scores[:, :, -1, 0]
    return OodCheck(
        timesteps=detection.ood_timesteps,
        median_kl_range=tuple(ranges),
        # A decoder of pixels returns every slice unchanged, except for rounding, so its error says nothing.
        reconstruction_range=NO_LOSS if config.pixel_latents else prediction_interval(errors, outside),
        latent_kl_range=make_range(low, high),
        max_outlier_fraction=detection.ood_max_outlier_fraction,
        max_outlier_slice_fraction=detection.ood_max_outlier_slice_fraction,
        min_solidity=smallest_solidity(scans) if detection.ood_checks_solidity else None,
        min_white_matter_contrast=smallest_contrast(scans, config) if detection.ood_checks_white_matter else None,
    )


def smallest_solidity(scans: list[ScanFeatures]) -> float:
    """Return the solidity that a share of the healthy slices does not reach. A whole scan has a far higher median."""
    found = np.concatenate([solidities(scan.foreground) for scan in scans])
    return round_significant(float(np.nanpercentile(found, SOLIDITY_PERCENTILE)))


def smallest_contrast(scans: list[ScanFeatures], config: Config) -> float:
    """Return the smallest accepted contrast of white matter: halfway between none (1) and the range of healthy scans.

    The range is that of new healthy scans on new scanners, like those of the other scores. Half of the difference is
    allowed, because T1 of some scanners has less contrast than any simulated scanner.
    """
    spacing, outside = config.preprocessing.spacing_mm, config.detection.ood_refused_share
    found = [
        [white_matter_contrast(x[:, 0], scan.foreground, spacing) for x in _on_simulated_scanners(scan, i, config)]
        for i, scan in enumerate(scans)
    ]
    return round_significant((1 + prediction_interval(np.array(found), outside).low) / 2)


def _on_simulated_scanners(scan: ScanFeatures, subject: int, config: Config) -> list[FloatArray]:
    """Return the slices (M, 1, H, W) of one healthy scan, unchanged and on each simulated scanner."""
    x, rng = scan.identity.encoded.x, np.random.default_rng([config.seed, SCANNER_STREAM, subject])
    count = config.detection.ood_simulated_scanners
    return [x, *(simulate_scanner(x[:, 0], config.augmentation.scanner, rng)[:, None] for _ in range(count))]


def _scanner_scores(
    scan: ScanFeatures, subject: int, networks: Networks, config: Config
) -> list[list[tuple[float, float]]]:
    """Return the scores of one healthy scan, unchanged and on each simulated scanner."""
    original = scan.identity.encoded
    encoded = [
        encode_view(x, original.foreground, original.slice_indices, networks, original.diffusion)
        for x in _on_simulated_scanners(scan, subject, config)
    ]
    errors = [reconstruction_error(e, networks) for e in encoded]
    return [
        [*median_kl_ranges(e, config.detection.ood_timesteps), (r, r)] for e, r in zip(encoded, errors, strict=True)
    ]


def simulate_other_scanner(x: FloatArray, config: Config, rng: np.random.Generator) -> FloatArray:
    """Return the slices of one head (M, H, W) as another scanner might image them, scaled as by the preprocessing."""
    changed = simulate_contrast(x, config.augmentation, rng)
    p = config.preprocessing
    if p.intensity_percentile is not None and p.intensity_level is not None:
        changed *= p.intensity_level / np.percentile(changed[x > 0], p.intensity_percentile)
    return simulate_scanner(np.clip(changed, 0, 1), config.augmentation.scanner, rng)


def residual_threshold(
    maps: Sequence[FloatArray], settings: Residual, false_positive_ml: float, voxel_ml: float
) -> float:
    """Return the lowest threshold at which the median healthy scan has no more than the allowed volume of findings.

    Parameters
    ----------
    maps : sequence of (M, H, W) ndarray
        Anomaly maps of healthy scans. NaN outside the valid mask.
    settings : Residual
        Smallest finding, and the ratio of the extent threshold to the threshold.
    false_positive_ml : float
    voxel_ml : float
    """
    extent_share = settings.extent_threshold / settings.threshold

    def median_ml(threshold: float) -> float:
        trial = settings.model_copy(update={"threshold": threshold, "extent_threshold": extent_share * threshold})
        return float(np.median([(label_findings(m, trial, voxel_ml)[0] > 0).sum() * voxel_ml for m in maps]))

    low, high = 0.0, float(np.nanmax(np.concatenate([m.ravel() for m in maps])))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if median_ml(middle) > false_positive_ml else (low, middle)
    return high


def calibrate_residual(
    scans: list[ScanFeatures], networks: Networks, config: Config, threshold: float, min_component: int
) -> Residual:
    """Calibrate the residual thresholds on the anomaly maps of healthy scans.

    Parameters
    ----------
    scans : list of ScanFeatures
    networks : Networks
    config : Config
    threshold : float
        KL threshold.
    min_component : int
    """
    d = config.detection

    def map_of(scan: ScanFeatures) -> FloatArray:
        views = [scan.views[view] for view in d.views]
        masks = [mask_latents(view, threshold, min_component, d.grow) for view in views]
        counterparts = [
            decode_view(view, mask, networks, d.reverse_timesteps) for view, mask in zip(views, masks, strict=True)
        ]
        anomaly = anomaly_map(scan, masks, counterparts, config)
        ordered = config.data.image_archive is None or config.data.image_archive.ordered
        return anomaly if ordered else separate_slices(anomaly)

    maps = [map_of(scan) for scan in tqdm(scans, desc="residuals", unit="scan")]
    return residual_settings(maps, config, [map_of(scan) for scan in simulated_scans(scans, networks, config)])


def simulated_scans(scans: list[ScanFeatures], networks: Networks, config: Config) -> Iterator[ScanFeatures]:
    """Yield the healthy scans as other scanners might image them."""
    draws = list(itertools.product(enumerate(scans), range(config.detection.simulated_scanners)))
    for (i, scan), k in tqdm(draws, desc="simulated scanners", unit="scan"):
        original, rng = scan.identity.encoded, np.random.default_rng([config.seed, CONTRAST_STREAM, i, k])
        x = simulate_other_scanner(original.x[:, 0], config, rng)[:, None]
        yield features_of_slices(x, original.foreground, original.slice_indices, networks, config)


def separate_slices(stack: FloatArray, before: npt.NDArray[np.int64] | None = None) -> FloatArray:
    """Insert NaN slices between the slices of a stack (M, H, W), so that findings cannot join across them.

    Parameters
    ----------
    stack : (M, H, W) ndarray
    before : (K,) ndarray of int, optional
        Slices that get a NaN slice in front of them. By default all but the first, which gives 2 M - 1 slices.

    Notes
    -----
    Consecutive images of an archive may not be neighbours: some are left out, and a block can mix heads. In the
    calibration, each image therefore counts alone. The evaluation and the service treat them as a stack.
    """
    at = np.arange(1, len(stack)) if before is None else before
    return np.insert(stack, at, np.nan, axis=0)


def residual_settings(maps: list[FloatArray], config: Config, simulated: Sequence[FloatArray] = ()) -> Residual:
    """Return the residual settings of the manifest, with thresholds from the anomaly maps of healthy scans.

    Parameters
    ----------
    maps : list of (M, H, W) ndarray
        Anomaly maps of the scans as they are.
    config : Config
    simulated : sequence of (M, H, W) ndarray
        Anomaly maps of the scans on simulated scanners. If there are none, only `maps` determine the thresholds.
    """
    d = config.detection
    settings = Residual(
        contrast_floor=d.contrast_floor,
        weighted_by_intensity=d.weighted_by_intensity,
        erosion=d.erosion,
        median_pixels=d.median_pixels,
        smoothing_mm=d.smoothing_mm,
        threshold=1.0,
        extent_threshold=d.extent_share,
        healthy_false_positive_ml=d.false_positive_ml,
        min_lesion_ml=d.min_lesion_ml,
    )
    voxel_ml = config.preprocessing.voxel_ml
    found = residual_threshold(maps, settings, d.false_positive_ml, voxel_ml)
    if simulated:
        limit = d.simulated_false_positive_ml
        found = max(found, residual_threshold(simulated, settings, limit, voxel_ml))
        settings = settings.model_copy(update={"simulated_false_positive_ml": limit})
    # Healthy scans without any residual do not determine a threshold.
    threshold = max(round_up_significant(found), d.min_threshold)
    thresholds = {"threshold": threshold, "extent_threshold": round_significant(d.extent_share * threshold)}
    return settings.model_copy(update=thresholds)


def calibration_path(config: Config) -> Path:
    """Return the file of the calibrated parts of the manifest, in the run folder."""
    return config.run_folder / "calibration.json"


def calibrate(config: Config) -> None:
    """Write the calibrated parts of the manifest."""
    d = config.detection
    networks = load_exported_networks(config)
    subjects = load_split(config.data.splits).validation
    scans = [
        extract_features(load_scan(config, s), networks, config) for s in tqdm(subjects, desc="KL maps", unit="scan")
    ]
    threshold = kl_threshold(scans, d.kl_percentile)
    min_component = smallest_component(scans, threshold, d.empty_slice_fraction)
    alpha_bar = Schedule.from_settings(config.schedule).alpha_bar
    slice_means = [
        kl[latents].mean()
        for s in scans
        for kl, latents in zip(s.identity.kl, s.identity.encoded.foreground_latents, strict=True)
    ]
    low, high = np.percentile(slice_means, SLICE_PERCENTILES)
    scan_means = [s.foreground_kl.mean() for s in scans]
    parts = {
        "kl": KlMap(
            timesteps=d.kl_timesteps,
            alpha_bar=(
                round(float(alpha_bar[min(d.kl_timesteps)]), 4),
                round(float(alpha_bar[max(d.kl_timesteps)]), 4),
            ),
            mean=d.kl_mean,
            smoothing_mm=d.kl_smoothing_mm,
            percentile=d.kl_percentile,
            threshold=round_significant(threshold),
            min_component=min_component,
            grow=d.grow,
        ),
        "reverse": Reverse(timesteps=d.reverse_timesteps),
        "residual": calibrate_residual(scans, networks, config, threshold, min_component),
        "ood": calibrate_ood(scans, networks, config),
        "calibration": Calibration(
            subjects=subjects,
            slice_score=make_range(low, high),
            scan_score=make_range(min(scan_means), max(scan_means)),
        ),
    }
    plain = {name: part.model_dump(mode="json") for name, part in parts.items()}
    calibration_path(config).write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    calibrate(parse_config(__doc__))
