"""Stage 4: every number that turns maps into masks, from healthy validation subjects alone."""

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import stats
from tqdm import tqdm

from app.manifest import Calibration, Gate, KlMap, Range, Residual, Reverse
from app.pipeline import anomaly
from app.pipeline.detect import gate_slices, reconstruction_error, typical_kl
from app.pipeline.findings import label_findings
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray
from training.config import Config
from training.data import load_volume, subject_path
from training.examine import Examined, examine, graph_models, imagine, judged_map, make_diffusion, make_schedule
from training.splits import load_split

# Candidates for the smallest connected component that stays in a latent mask.
COMPONENTS = range(1, 40)
# A healthy latent lies between these percentiles; the gate counts those outside.
LATENT_PERCENTILES = (0.1, 99.9)
REPORTED_PERCENTILES = (0.5, 99.5)
# Halvings of the range of a threshold: finer than the digits that are kept.
BISECTIONS = 20


def kl_threshold(scans: list[Examined], percentile: float) -> float:
    """Percentile of the KL over the foreground latents of healthy scans."""
    return float(np.percentile(np.concatenate([s.kl[s.latents] for s in scans]), percentile))


def smallest_component(scans: list[Examined], threshold: float, empty_share: float) -> int:
    """k, such that at least `empty_share` of the healthy slices come out with an empty mask."""
    for k in COMPONENTS:
        empty = [~latent_mask(s, threshold, k, 0).any(axis=(1, 2)) for s in scans]
        if np.concatenate(empty).mean() >= empty_share:
            return k
    raise SystemExit(f"no component size up to {COMPONENTS[-1]} leaves {empty_share:.0%} of healthy slices empty")


def latent_mask(scan: Examined, threshold: float, min_component: int, grow: int) -> BoolArray:
    """The latent mask of an examined scan."""
    return anomaly.latent_mask(scan.kl, scan.latents, threshold, min_component, grow)


def significant(value: float) -> float:
    """Six digits: more would only pretend."""
    return float(f"{value:.6g}")


def span(low: float, high: float) -> Range:
    """A range for the manifest."""
    return Range(low=significant(low), high=significant(high))


def next_healthy(values: npt.NDArray[np.float64], refused: float) -> Range:
    """The range that holds the next healthy scan but for a share of `refused`, from a few of them.

    Prediction interval by Student's t, on logarithms: scores are positive and skewed.
    """
    logs, n = np.log(values), len(values)
    reach = stats.t.ppf(1 - refused / 2, n - 1) * logs.std(ddof=1) * np.sqrt(1 + 1 / n)
    return span(np.exp(logs.mean() - reach), np.exp(logs.mean() + reach))


def calibrate_gate(scans: list[Examined], models: Models, config: Config) -> Gate:
    """What the next healthy scan spans: all its scores together refuse as many as the configuration says."""
    d = config.detection
    low, high = np.percentile(np.concatenate([s.kl[s.latents] for s in scans]), LATENT_PERCENTILES)
    diffusion = make_diffusion(models, config)
    scores = np.array([_gate_scores(s, diffusion, d.gate_timesteps) for s in scans])  # (scans, levels + 1)
    *typical, reconstruction = (next_healthy(v, d.gate_refused / scores.shape[1]) for v in scores.T)
    return Gate(
        timesteps=d.gate_timesteps,
        typical=tuple(typical),
        reconstruction=reconstruction,
        latent=span(low, high),
        max_fraction_out=d.gate_fraction_out,
    )


def _gate_scores(scan: Examined, diffusion: anomaly.Diffusion, timesteps: tuple[int, ...]) -> list[float]:
    some = gate_slices(len(scan.x))
    typical = typical_kl(scan.z0[some], scan.known[some], scan.latents[some], diffusion, timesteps)
    return [*typical, reconstruction_error(scan.x[some], scan.foreground[some], scan.reconstruction[some])]


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
    scans: list[Examined], masks: list[BoolArray], models: Models, config: Config, kl_at: float
) -> Residual:
    """The residual thresholds at which healthy scans show as little as the configuration says."""
    maps = []
    for scan, mask in tqdm(list(zip(scans, masks, strict=True)), desc="residuals", unit="scan"):
        maps.append(judged_map(scan, mask, imagine(scan, mask, models, config), kl_at, config))
    return residual_settings(maps, config)


def residual_settings(maps: list[FloatArray], config: Config) -> Residual:
    """The settings of the residual, with thresholds from the anomaly maps of healthy scans."""
    d = config.detection
    settings = Residual(
        reference=d.reference,
        contrast_floor=d.contrast_floor,
        weighted_by_kl=d.weighted_by_kl,
        erosion=d.erosion,
        smoothing_mm=d.smoothing_mm,
        threshold=1.0,
        extent_threshold=d.extent_share,
        healthy_false_positive_ml=d.false_positive_ml,
        min_lesion_ml=d.min_lesion_ml,
    )
    found = residual_threshold(maps, settings, d.false_positive_ml, config.preparation.voxel_ml)
    # A healthy set without any residual says nothing of how small a difference matters.
    threshold = max(significant(found), d.least_threshold)
    thresholds = {"threshold": threshold, "extent_threshold": significant(d.extent_share * threshold)}
    return settings.model_copy(update=thresholds)


def examined_subjects(config: Config, models: Models, subjects: tuple[str, ...]) -> list[Examined]:
    """Healthy scans up to their KL maps."""
    return [
        examine(load_volume(subject_path(config, s)), models, config)
        for s in tqdm(subjects, desc="KL maps", unit="scan")
    ]


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
    masks = [latent_mask(s, threshold, k, d.grow) for s in scans]
    alpha_bar = make_schedule(config.schedule).alpha_bar
    by_slice = np.concatenate([[k[inside].mean() for k, inside in zip(s.kl, s.latents, strict=True)] for s in scans])
    low, high = np.percentile(by_slice, REPORTED_PERCENTILES)
    by_scan = np.array([s.kl[s.latents].mean() for s in scans])
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
        "residual": calibrate_residual(scans, masks, models, config, threshold),
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
