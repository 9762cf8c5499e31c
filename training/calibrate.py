"""Stage 4: every number that turns maps into masks, from healthy validation subjects alone."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import stats
from tqdm import tqdm

from app.manifest import Calibration, KlMap, OodCheck, Range, Residual, Reverse
from app.pipeline import diffusion
from app.pipeline.diffusion import encode_view
from app.pipeline.findings import label_findings
from app.pipeline.networks import Networks
from app.pipeline.ood import median_kl_ranges, reconstruction_error
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import load_scan
from training.examine import Examined, Look, examine, graph_models, imagine_look, judged_map, make_schedule
from training.scanner import another_scanner
from training.splits import load_split

# Candidates for the smallest connected component that stays in a latent mask.
COMPONENTS = range(1, 40)
# A healthy latent lies between these percentiles; the gate counts those outside.
LATENT_PERCENTILES = (0.1, 99.9)
REPORTED_PERCENTILES = (0.5, 99.5)
# Part of the seed that the gate's scanners are drawn from.
GATE_STREAM = 6
# Halvings of the range of a threshold: finer than the digits that are kept.
BISECTIONS = 20


def kl_threshold(scans: list[Examined], percentile: float) -> float:
    """Percentile of the KL over the foreground latents of healthy scans."""
    return float(
        np.percentile(np.concatenate([s.plain.kl[s.plain.seen.foreground_latents] for s in scans]), percentile)
    )


def smallest_component(scans: list[Examined], threshold: float, empty_share: float) -> int:
    """k, such that at least `empty_share` of the healthy slices come out with an empty mask.

    Raises
    ------
    SystemExit
        No size that is tried is enough.
    """
    found = next(components(scans, threshold, empty_share), None)
    if found is None:
        raise SystemExit(f"no component size up to {COMPONENTS[-1]} leaves {empty_share:.0%} of healthy slices empty")
    return found


def components(scans: list[Examined], threshold: float, empty_share: float) -> Iterator[int]:
    """Every k that is tried and leaves so many healthy slices empty, the smallest first."""
    for k in COMPONENTS:
        empty = [~latent_mask(s.plain, threshold, k, 0).any(axis=(1, 2)) for s in scans]
        if np.concatenate(empty).mean() >= empty_share:
            yield k


def latent_mask(look: Look, threshold: float, min_component: int, grow: int) -> BoolArray:
    """The latent mask of one view."""
    return diffusion.latent_mask(look.kl, look.seen.foreground_latents, threshold, min_component, grow)


def latent_masks(scan: Examined, threshold: float, min_component: int, config: Config) -> list[BoolArray]:
    """The latent masks of each view of the configuration."""
    d = config.detection
    return [latent_mask(scan.looks[view], threshold, min_component, d.grow) for view in d.views]


def imagine_all(scan: Examined, masks: list[BoolArray], models: Networks, config: Config) -> list[FloatArray]:
    """The decoded counterparts of each view of the configuration."""
    d = config.detection
    looks = [scan.looks[view] for view in d.views]
    return [imagine_look(look, m, models, d.reverse_timesteps) for look, m in zip(looks, masks, strict=True)]


def significant(value: float) -> float:
    """Six digits: more would only pretend."""
    return float(f"{value:.6g}")


def span(low: float, high: float) -> Range:
    """A range for the manifest."""
    return Range(low=significant(low), high=significant(high))


def next_healthy(values: npt.NDArray[np.float64], refused: float) -> Range:
    """The range that holds the next healthy scan, from the next scanner, but for a share of `refused`.

    Prediction interval on logarithms, since scores are positive and skewed, from a one-way layout: what
    differs between subjects and what differs between scanners add up (Searle, Casella & McCulloch 1992,
    chapter 3), and Student's t takes the degrees of freedom of their sum (Satterthwaite 1946).

    Parameters
    ----------
    values : (subjects, scanners) ndarray
    """
    logs = np.log(values)
    n, scanners = logs.shape
    between = scanners * logs.mean(axis=1).var(ddof=1)
    within = logs.var(axis=1, ddof=1).mean() if scanners > 1 else 0.0
    parts = np.array([between / scanners, within * (scanners - 1) / scanners])
    degrees = parts.sum() ** 2 / (parts**2 / [n - 1, max(n * (scanners - 1), 1)]).sum()
    sd = np.sqrt(parts.sum() + between / (n * scanners))  # the mean is known from n subjects alone
    reach = stats.t.ppf(1 - refused / 2, degrees) * sd
    return span(np.exp(logs.mean() - reach), np.exp(logs.mean() + reach))


def calibrate_gate(scans: list[Examined], models: Networks, config: Config) -> OodCheck:
    """What the next healthy scan spans: all its scores together refuse as many as the configuration says."""
    d = config.detection
    low, high = np.percentile(
        np.concatenate([s.plain.kl[s.plain.seen.foreground_latents] for s in scans]), LATENT_PERCENTILES
    )
    # (subjects, scanners, levels + 1, 2): the least and the greatest of a scan.
    scores = np.array([_seen_by_scanners(s, i, models, config) for i, s in enumerate(tqdm(scans, desc="gate"))])
    refused = d.gate_refused / scores.shape[2]
    ranges = [
        span(next_healthy(level[..., 1], refused).low, next_healthy(level[..., 0], refused).high)
        for level in np.moveaxis(scores, 2, 0)
    ]
    return OodCheck(
        timesteps=d.gate_timesteps,
        median_kl_range=tuple(ranges[:-1]),
        reconstruction_range=ranges[-1],
        latent_kl_range=span(low, high),
        max_outlier_fraction=d.gate_fraction_out,
        max_outlier_slice_fraction=d.gate_slices_out,
    )


def _seen_by_scanners(
    scan: Examined, subject: int, models: Networks, config: Config
) -> list[list[tuple[float, float]]]:
    """Scores of the gate for one healthy scan as it is, and as other scanners might show it."""
    plain, rng = scan.plain.seen, np.random.default_rng([config.seed, GATE_STREAM, subject])
    seen = [plain]
    for _ in range(config.detection.gate_scanners):
        x = another_scanner(plain.x[:, 0], config.augmentation.scanner, rng)[:, None]
        seen.append(encode_view(x, plain.foreground, plain.slice_indices, models, plain.diffusion))
    errors = [reconstruction_error(s, models) for s in seen]
    return [[*median_kl_ranges(s, config.detection.gate_timesteps), (e, e)] for s, e in zip(seen, errors, strict=True)]


def residual_threshold(maps: list[FloatArray], settings: Residual, false_positive_ml: float, voxel_ml: float) -> float:
    """The lowest threshold at which the median healthy scan shows no more than so much, in millilitres.

    Parameters
    ----------
    maps : list of (K, H, W) ndarray
        Anomaly maps of healthy scans; NaN where nothing was judged.
    settings : Residual
        The smallest finding, and the share of the threshold that findings reach down to.
    """
    share = settings.extent_threshold / settings.threshold

    def found_ml(threshold: float) -> float:
        at = settings.model_copy(update={"threshold": threshold, "extent_threshold": share * threshold})
        return float(np.median([(label_findings(m, at, voxel_ml)[0] > 0).sum() * voxel_ml for m in maps]))

    low, high = 0.0, float(np.nanmax(np.concatenate([m.ravel() for m in maps])))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if found_ml(middle) > false_positive_ml else (low, middle)
    return high


def calibrate_residual(
    scans: list[Examined], models: Networks, config: Config, kl_at: float, component: int
) -> Residual:
    """The residual thresholds at which healthy scans show as little as the configuration says."""
    maps = []
    for scan in tqdm(scans, desc="residuals", unit="scan"):
        masks = latent_masks(scan, kl_at, component, config)
        maps.append(judged_map(scan, masks, imagine_all(scan, masks, models, config), kl_at, config))
    if config.data.pictures is not None:
        maps = [apart(each) for each in maps]
    return residual_settings(maps, config)


def apart(stack: FloatArray) -> FloatArray:
    """Slices that are no neighbours in a head, with nothing between them that could join findings, (2 K - 1, H, W)."""
    spread = np.full((2 * len(stack) - 1, *stack.shape[1:]), np.nan, dtype=np.float32)
    spread[::2] = stack
    return spread


def residual_settings(maps: list[FloatArray], config: Config) -> Residual:
    """The settings of the residual, with thresholds from the anomaly maps of healthy scans."""
    d = config.detection
    settings = Residual(
        reference=d.reference,
        contrast_floor=d.contrast_floor,
        weighted_by_kl=d.weighted_by_kl,
        weighted_by_intensity=d.weighted_by_intensity,
        erosion=d.erosion,
        median_pixels=d.median_pixels,
        smoothing_mm=d.smoothing_mm,
        threshold=1.0,
        extent_threshold=d.extent_share,
        healthy_false_positive_ml=d.false_positive_ml,
        min_lesion_ml=d.min_lesion_ml,
    )
    found = residual_threshold(maps, settings, d.false_positive_ml, config.preprocessing.voxel_ml)
    # A healthy set without any residual says nothing of how small a difference matters.
    threshold = max(significant(found), d.least_threshold)
    thresholds = {"threshold": threshold, "extent_threshold": significant(d.extent_share * threshold)}
    return settings.model_copy(update=thresholds)


def examined_subjects(config: Config, models: Networks, subjects: tuple[str, ...]) -> list[Examined]:
    """Healthy scans up to their KL maps."""
    return [examine(load_scan(config, s), models, config) for s in tqdm(subjects, desc="KL maps", unit="scan")]


def calibration_path(config: Config) -> Path:
    """Where the calibrated parts wait for the manifest."""
    return config.run_folder / "calibration.json"


def calibrate(config: Config) -> None:
    """Write the calibrated parts of the manifest."""
    d = config.detection
    models = graph_models(config)
    subjects = load_split(config.data.splits).validation
    scans = examined_subjects(config, models, subjects)
    threshold = kl_threshold(scans, d.kl_percentile)
    k = smallest_component(scans, threshold, d.empty_share)
    alpha_bar = make_schedule(config.schedule).alpha_bar
    by_slice = np.concatenate(
        [[kl[f].mean() for kl, f in zip(s.plain.kl, s.plain.seen.foreground_latents, strict=True)] for s in scans]
    )
    low, high = np.percentile(by_slice, REPORTED_PERCENTILES)
    by_scan = np.array([s.plain.kl[s.plain.seen.foreground_latents].mean() for s in scans])
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
            threshold=significant(threshold),
            min_component=k,
            grow=d.grow,
        ),
        "reverse": Reverse(timesteps=d.reverse_timesteps),
        "residual": calibrate_residual(scans, models, config, threshold, k),
        "gate": calibrate_gate(scans, models, config),
        "calibration": Calibration(
            subjects=subjects,
            slice_score=span(low, high),
            scan_score=span(by_scan.min(), by_scan.max()),
        ),
    }
    plain = {name: part.model_dump(mode="json") for name, part in parts.items()}
    calibration_path(config).write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    calibrate(Config.load(Path(sys.argv[1])))
