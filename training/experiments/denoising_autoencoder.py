"""Denoising autoencoder in pixel space (Kascenas et al. 2022) against a bundle: accuracy, false findings and time.

`python -m training.experiments.denoising_autoencoder train CONFIG` trains it, or continues its training. With `compare
CONFIG BUNDLE`, it measures both on test subjects and writes docs/evaluation/NAME-denoising-autoencoder.json and .md.

The autoencoder learns to remove the same patches of coarse noise as the denoiser of the bundle (decision 8), from the
same slices. It has no latents and no diffusion: it runs once per view. The difference between a slice and its output is
the anomaly map. Views, filters and the rule for the threshold are those of the bundle.

A. Kascenas, N. Pugeault, A. O'Neil: Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from app.manifest import Manifest, View
from app.pipeline.findings import dice, label_findings
from app.pipeline.scores import augment, average_views, erode_foreground, postprocess_residual
from app.runtime.bundle import Bundle, load_bundle
from app.volume import FloatArray
from training.augment import add_coarse_noise
from training.calibrate import residual_settings
from training.cluster_bootstrap import Interval, cluster_weights, interval, mean, quantile
from training.config import ROOT, Config, PixelLatentsConfig
from training.data import UINT16_MAX, HealthySlices, load_scan, load_split
from training.experiments.cases import Case, make_case, synthetic
from training.experiments.markdown import format_interval, table
from training.experiments.metrics import average_precision, best_dice
from training.experiments.segmentation import count_scores, counterpart_map, mask_map
from training.loop import Batches, Run, TrainingOptions, device, load_modules, make_generator
from training.networks import build_denoiser, matching_denoiser_weights

NAME = "denoising-autoencoder"
STEPS, BATCH, LEARNING_RATE = 2400, 16, 6e-4
VALIDATE_EVERY, VALIDATION_SLICES = 240, 256
# Pixels are folded into channels, as in pixel latents.
FOLD = 2
# Random streams of the coarse noise in training and in validation, in addition to the seed of the configuration.
NOISE_STREAM, VALIDATION_STREAM = 7, 8
# Healthy validation scans that the threshold of each method comes from.
CALIBRATION_SCANS = 10
GRADES = ("grade 2", "grade 3")
BOOTSTRAP_SEED = 0

Row = dict[str, Any]
AnomalyMap = Callable[[Case], FloatArray]


class DenoisingAutoencoder(nn.Module):
    """U-Net of the size of the bundle's denoiser that predicts what must be added to a slice to make it healthy."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        folded = {"vqvae": None, "pixel_latents": PixelLatentsConfig(fold=FOLD)}
        self.unet = build_denoiser(config.model_copy(update=folded))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the healthy version (N, 1, H, W) of slices (N, 1, H, W) in [0, 1]."""
        # The network of the denoiser expects a time step. Here it is constant.
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        change = F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, FOLD), t), FOLD)
        # The background is known and stays 0.
        restored: torch.Tensor = (x + change).clamp(0, 1) * (x > 0)
        return restored


def denoising_loss(network: nn.Module, x: torch.Tensor, config: Config, rng: torch.Generator) -> torch.Tensor:
    """Return the mean squared error over the foreground after coarse noise is removed from slices (N, 1, H, W)."""
    error: torch.Tensor = network(add_coarse_noise(x, config.coarse_noise, rng)) - x
    return error.square().sum() / (x > 0).sum()


# ---- training ----------------------------------------------------------------------------------


def train(config: Config, healthy: HealthySlices | None = None, steps: int = STEPS) -> int:
    """Train the autoencoder, or continue its training, and return the number of completed steps.

    It starts from the inner layers of the bundle's denoiser, so that both have seen about as many slices.
    """
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    network = DenoisingAutoencoder(config).to(device()).train()
    if config.denoiser.warm_start:
        start = config.model_copy(update={"version": config.denoiser.warm_start})
        network.unet.load_state_dict(matching_denoiser_weights(start.bundle_folder, network.unet))
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    progress = TrainingOptions().progress(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3
    )
    run = Run(
        NAME, config, f"{healthy.data} {steps} {BATCH} {LEARNING_RATE}", {"network": network}, optimiser, schedule
    )

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = denoising_loss(network, x, config, make_generator(config.seed, NOISE_STREAM, step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        some = healthy.validation[:: max(1, len(healthy.validation) // VALIDATION_SLICES)]
        x = torch.from_numpy(some.astype(np.float32) / UINT16_MAX)[:, None].to(device())
        rng = make_generator(config.seed, VALIDATION_STREAM)
        return {"val_loss": float(np.mean([float(denoising_loss(network, p, config, rng)) for p in x.split(BATCH)]))}

    batches = Batches(healthy.train, BATCH, config.seed, config.augmentation)
    return run.train(batches, progress, step_fn, validate, VALIDATE_EVERY)


# ---- comparison --------------------------------------------------------------------------------


def autoencoder_map(network: nn.Module, manifest: Manifest, views: Sequence[View]) -> AnomalyMap:
    """Return the anomaly map of the autoencoder: the mean difference over views, filtered as the bundle does it."""

    def compute(case: Case) -> FloatArray:
        differences = []
        for view in views:
            x = augment(case.x, view)
            with torch.inference_mode():
                restored = torch.cat([network(part) for part in torch.from_numpy(x).split(BATCH)]).numpy()
            differences.append(np.abs(x - restored)[:, 0])
        valid = erode_foreground(case.foreground, manifest.residual.erosion)
        mean_difference = average_views(differences, views)
        return postprocess_residual(
            mean_difference, case.x, valid, manifest.residual, manifest.preprocessing.spacing_mm
        )

    return compute


def methods(config: Config, bundle: Bundle) -> Iterator[tuple[str, AnomalyMap]]:
    """Yield the name and the anomaly map of the bundle and of the autoencoder, with all views and with one."""
    network = DenoisingAutoencoder(config)
    load_modules(config, NAME, {"network": network})
    networks = bundle.networks.in_batches(BATCH, lambda _: None)
    for views in (bundle.manifest.views, bundle.manifest.views[:1]):
        count = f"{len(views)} view{'s' if len(views) > 1 else ''}"
        fewer = bundle.manifest.model_copy(update={"views": views})
        yield f"{bundle.manifest.id}, {count}", counterpart_map(networks, fewer)
        yield f"denoising autoencoder, {count}", autoencoder_map(network, bundle.manifest, views)


def healthy_cases(config: Config, manifest: Manifest, subjects: Sequence[str]) -> list[Case]:
    """Return healthy scans as cases without a lesion."""
    volumes = [(subject, load_scan(config, subject).volume) for subject in subjects]
    return [make_case(s, "healthy", v, np.zeros(v.shape, np.bool_), manifest) for s, v in volumes]


def measure(config: Config, bundle: Bundle) -> list[Row]:
    """Measure every method on healthy and lesioned test scans, with a threshold from healthy validation scans."""
    manifest, split = bundle.manifest, load_split(config.data.splits)
    spread = np.linspace(0, len(split.validation) - 1, CALIBRATION_SCANS).round().astype(int)
    calibration = healthy_cases(config, manifest, [split.validation[i] for i in spread])
    healthy = healthy_cases(config, manifest, split.test)
    lesioned = [case for case in synthetic(config, manifest, "test") if case.kind in GRADES]
    rows = []
    for name, compute in methods(config, bundle):
        settings = residual_settings([mask_map(compute(case), case) for case in calibration], config)

        def found(values: FloatArray, case: Case, settings: Any = settings) -> Any:
            return label_findings(mask_map(values, case), settings, manifest.preprocessing.voxel_ml)[0] > 0

        false_ml = [
            float(found(compute(case), case).sum()) * manifest.preprocessing.voxel_ml
            for case in tqdm(healthy, desc=f"{name}: healthy", unit="scan")
        ]
        start = time.perf_counter()
        maps = [compute(case) for case in tqdm(lesioned, desc=f"{name}: lesions", unit="scan")]
        milliseconds = (time.perf_counter() - start) * 1000 / sum(len(case.slice_indices) for case in lesioned)
        row: Row = {"method": name, "threshold": settings.threshold, "ms_per_slice": milliseconds}
        row["false_ml"] = list(interval(quantile(false_ml), cluster_weights(list(split.test), seed=BOOTSTRAP_SEED)))
        for grade in GRADES:
            chosen = [(m, case) for m, case in zip(maps, lesioned, strict=True) if case.kind == grade]
            counts = [count_scores([m], [case]) for m, case in chosen]
            weights = cluster_weights([case.subject for _, case in chosen], seed=BOOTSTRAP_SEED)
            scores = {
                "auprc": [c.pooled(average_precision) for c in counts],
                "best_dice": [c.pooled(best_dice) for c in counts],
                "dice": [dice(found(m, case), case.truth) for m, case in chosen],
            }
            row[grade] = {key: list(interval(mean(values), weights)) for key, values in scores.items()}
        rows.append(row)
    return rows


def page(document: Row) -> str:
    """Return the page of a comparison."""
    protocol = (
        "Written by `python -m training.experiments.denoising_autoencoder compare CONFIG BUNDLE`. Test subjects of the "
        f"configuration with one lesion shape each ({', '.join(GRADES)}), and without a lesion. The threshold of each "
        f"method is the lowest one at which the median of {CALIBRATION_SCANS} healthy validation scans has at most "
        f"{document['false_positive_ml']:g} ml of findings. Means over subjects with bootstrap 95 % intervals over "
        "subjects; false findings are medians. Milliseconds are those of the same run."
    )
    training = (
        f"Training of the autoencoder: {document['steps']} steps of {BATCH} slices, from the inner layers of the "
        f"denoiser of {document['start']}. Its last and first layer have seen only these slices. {document['note']}"
    )
    columns = [f"{score}, {grade}" for grade in GRADES for score in ("AUPRC", "best Dice", "Dice")]
    rows = [
        [
            row["method"],
            f"{row['ms_per_slice']:.1f}",
            format_interval(Interval(*row["false_ml"])),
            *(format_interval(Interval(*row[g][key])) for g in GRADES for key in ("auprc", "best_dice", "dice")),
        ]
        for row in document["rows"]
    ]
    title = f"# {document['bundle']} and a denoising autoencoder in pixel space"
    scores = table(["method", "ms per slice", "false findings, ml", *columns], rows)
    return f"{title}\n\n{protocol}\n\n{training}\n\n{scores}\n"


def compare(config: Config, bundle: Bundle, note: str) -> None:
    """Measure, and write the result and its page."""
    provenance = load_modules(config, NAME, {"network": DenoisingAutoencoder(config)})
    document = {
        "bundle": bundle.manifest.id,
        "bundle_sha256": bundle.sha256,
        "steps": int(provenance["step"]),
        "start": f"{config.name}-{config.denoiser.warm_start}",
        "fingerprint": provenance["fingerprint"],
        "false_positive_ml": config.detection.false_positive_ml,
        "note": note,
        "rows": measure(config, bundle),
    }
    path = ROOT / "docs" / "evaluation" / f"{config.name}-{NAME}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(document))


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "compare"))
    parser.add_argument("config", type=Path)
    parser.add_argument("bundle", type=Path, nargs="?", help="folder of the bundle to compare with")
    parser.add_argument("--note", default="", help="sentence for the page")
    options = parser.parse_args()
    config = Config.load(options.config)
    if options.command == "train":
        train(config)
    else:
        compare(config, load_bundle(options.bundle or config.bundle_folder), options.note)


if __name__ == "__main__":
    main()
