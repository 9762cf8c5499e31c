"""Stage 4: every number that turns maps into masks, from healthy validation subjects alone."""

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.manifest import Calibration, Gate, KlMap, Range, Residual, Reverse
from app.pipeline import anomaly
from app.pipeline.detect import gate_slices
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray
from training.config import Config
from training.data import load_volume, subject_path
from training.examine import Examined, anomaly_map, examine, graph_models, imagine, make_schedule
from training.splits import load_split

# Candidates for the smallest connected component that stays in a latent mask.
COMPONENTS = range(1, 40)
# A healthy latent lies between these percentiles; the gate counts those outside.
LATENT_PERCENTILES = (0.1, 99.9)
REPORTED_PERCENTILES = (0.5, 99.5)


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


def around(values: npt.NDArray[np.float64], deviations: float) -> Range:
    """Mean and so many standard deviations on either side, of the logarithm: scores are skewed."""
    logs = np.log(values)
    spread = deviations * logs.std(ddof=1)
    return span(np.exp(logs.mean() - spread), np.exp(logs.mean() + spread))


def calibrate_gate(scans: list[Examined], config: Config) -> Gate:
    """What healthy scans span, with the configuration's margin on both sides."""
    low, high = np.percentile(np.concatenate([s.kl[s.latents] for s in scans]), LATENT_PERCENTILES)
    return Gate(
        score=around(np.array([s.kl[s.latents].mean() for s in scans]), config.detection.gate_deviations),
        reconstruction=around(np.array([_gate_error(s) for s in scans]), config.detection.gate_deviations),
        latent=span(low, high),
        max_fraction_out=config.detection.gate_fraction_out,
    )


def _gate_error(scan: Examined) -> float:
    some = gate_slices(len(scan.x))
    error: FloatArray = np.abs(scan.reconstruction[some] - scan.x[some])[scan.foreground[some]]
    return float(error.mean())


def calibrate_residual(
    scans: list[Examined], masks: list[BoolArray], models: Models, config: Config, kl_at: float
) -> Residual:
    """The residual threshold that leaves the stated share of healthy foreground pixels above it."""
    d = config.detection
    values = []
    for scan, mask in tqdm(list(zip(scans, masks, strict=True)), desc="residuals", unit="scan"):
        counterpart = imagine(scan, mask, models, config)
        score = anomaly_map(scan, mask, counterpart, kl_at, config)
        values.append(score[anomaly.erode(scan.foreground, d.erosion)])
    threshold = float(np.quantile(np.concatenate(values), 1 - d.false_positive_rate))
    return Residual(
        reference=d.reference,
        contrast_floor=d.contrast_floor,
        weighted_by_kl=d.weighted_by_kl,
        erosion=d.erosion,
        smoothing_mm=d.smoothing_mm,
        # A healthy set without any residual says nothing of how small a difference matters.
        threshold=round(max(threshold, d.least_threshold), 5),
        healthy_false_positive_rate=d.false_positive_rate,
        min_lesion_ml=d.min_lesion_ml,
    )


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
        "gate": calibrate_gate(scans, config),
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
