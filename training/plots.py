"""Plots of a training: loss curves, and the detection on validation slices."""

import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

mpl.use("Agg")
from matplotlib import pyplot as plt

from app.pipeline.detect import Detection
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle
from app.volume import Volume
from training.config import Config
from training.data import load_scan, load_split
from training.lesion_insertion import insert_ellipses, insert_lesion, load_lesion_shape

BATCH = 16
CONTRAST = 0.35
# Validation lesion shape, and radius of the ellipses for image archives.
SHAPE_INDEX = 6
ELLIPSE_PIXELS = 6.0
# Heights of the shown slices, as shares of the analysed slices.
HEIGHTS = (0.35, 0.55, 0.75)


def read_curve(path: Path) -> dict[str, list[float]]:
    """Read the columns of a training curve."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def draw_curves(config: Config, path: Path) -> None:
    """Plot the training and validation losses of the trained stages."""
    if config.pixel_latents is None:
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
        _draw_vqvae_curve(config, left)
    else:
        figure, right = plt.subplots(figsize=(8, 4), layout="constrained")
    denoiser = read_curve(config.run_folder / "denoiser.csv")
    labels = {
        "val_mse_coarse_t": "validation, coarse noise, t = ",
        "val_mse_t": "validation, t = ",
        "loss": "training, weighted",
    }
    for key, values in denoiser.items():
        if key != "step":
            start = next(start for start in labels if key.startswith(start))
            right.plot(denoiser["step"], values, label=labels[start] + key.removeprefix(start))
    right.set(
        title="Denoiser: error of the noise by time step", xlabel="step", ylabel="mean squared error", yscale="log"
    )
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_vqvae_curve(config: Config, left: Axes) -> None:
    """Plot the losses of the VQ-VAE."""
    vqvae = read_curve(config.run_folder / "vqvae.csv")
    for key, label in (
        ("l1", "training L1"),
        ("val_l1", "validation L1"),
        ("val_l1_foreground", "validation L1, foreground"),
    ):
        left.plot(vqvae["step"], vqvae[key], label=label)
    used = int(vqvae["val_codes_used"][-1])
    left.set(title=f"VQ-VAE: {used} of {config.vqvae_settings.codes} codes used", xlabel="step", yscale="log")
    left.legend()


def draw_validation(config: Config, bundle: Bundle, path: Path) -> None:
    """Plot the detection on slices of a validation scan: unchanged, and with a bright and a dark lesion."""
    scan = load_scan(config, load_split(config.data.splits).validation[0]).volume
    volumes = [("unchanged", scan), *((f"{c:+}", add_lesion(config, scan, c)) for c in (CONTRAST, -CONTRAST))]
    rows = []
    for label, volume in volumes:
        models = bundle.networks.in_batches(BATCH, lambda _: None)
        detection = METHODS[bundle.manifest.method](volume, models, bundle.manifest)
        analysed = np.flatnonzero(detection.analysed)
        indices = [int(analysed[int(h * len(analysed))]) for h in HEIGHTS]
        rows += [(f"{label}, slice {i}", _panels(detection, bundle, i)) for i in indices]
    kl_limit, residual_limit = 2 * bundle.manifest.kl.threshold, 3 * bundle.manifest.residual.threshold
    columns = (
        ("original", 1.0, "gray"),
        ("reconstruction", 1.0, "gray"),
        ("counterpart", 1.0, "gray"),
        ("KL map (nats)", kl_limit, "inferno"),
        ("anomaly map", residual_limit, "inferno"),
    )
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(9, 2.1 * len(rows)), layout="constrained")
    for line, (label, panels) in zip(axes, rows, strict=True):
        for axis, panel, (_, limit, cmap) in zip(line, panels, columns, strict=True):
            # Rows run from posterior to anterior, so the origin is below. The patient's left is on the right.
            axis.imshow(panel, cmap=cmap, vmin=0, vmax=limit, origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, fontsize="small")
    for axis, (title, _, _) in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def add_lesion(config: Config, scan: Volume, contrast: float) -> Volume:
    """Insert a validation lesion shape into a scan, or an ellipse into each image of a stack."""
    if config.data.image_archive is None:
        shape = load_lesion_shape(load_split(config.data.splits).shapes_validation[SHAPE_INDEX])
        return insert_lesion(scan, shape, contrast, 0).volume
    radius_mm = ELLIPSE_PIXELS * config.preprocessing.spacing_mm[1]
    return insert_ellipses(scan, radius_mm, contrast, 0, ct=config.preprocessing.window is not None, every=1).volume


def _panels(detection: Detection, bundle: Bundle, index: int) -> tuple[npt.NDArray[np.float32], ...]:
    x = detection.slices.x[index : index + 1]
    reconstruction = bundle.networks.decode(bundle.networks.encode(x))[0, 0]
    return x[0, 0], reconstruction, detection.counterpart[index], detection.kl[index], detection.anomaly[index]
