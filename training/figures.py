"""Loss curves, and what the model makes of validation slices: to be looked at."""

import csv
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from app.pipeline.detect import Detection, detect
from app.runtime.bundle import Bundle
from app.volume import Volume
from training.config import Config
from training.data import load_scan
from training.lesions import gold_shape, insert_lesion, insert_sprites
from training.splits import load_split

GRADE_3 = 0.35
# The middle of METHOD's radii for pictures.
SPRITE_PIXELS = 6.0
# Heights in the brain, as a share of the analysed slices.
HEIGHTS = (0.35, 0.55, 0.75)


def read_curve(path: Path) -> dict[str, list[float]]:
    """Columns of a stage's curve."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def draw_curves(config: Config, path: Path) -> None:
    """Training and validation losses of both stages."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    vqvae = read_curve(config.run_folder / "vqvae.csv")
    for key, label in (
        ("l1", "train L1"),
        ("val_l1", "validation L1"),
        ("val_l1_foreground", "validation L1, foreground"),
    ):
        left.plot(vqvae["step"], vqvae[key], label=label)
    used = int(vqvae["val_codes_used"][-1])
    left.set(title=f"VQ-VAE: {used} of {config.vqvae.codes} codes used", xlabel="step", yscale="log")
    left.legend()
    denoiser = read_curve(config.run_folder / "denoiser.csv")
    names = {
        "val_mse_coarse_t": "validation, coarse noise, t = ",
        "val_mse_t": "validation, t = ",
        "loss": "train, weighed",
    }
    for key, values in denoiser.items():
        if key != "step":
            start = next(start for start in names if key.startswith(start))
            right.plot(denoiser["step"], values, label=names[start] + key.removeprefix(start))
    right.set(title="Denoiser: noise error by level", xlabel="step", ylabel="mean squared error", yscale="log")
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_validation(config: Config, bundle: Bundle, path: Path) -> None:
    """Original, reconstruction, counterpart and anomaly map of validation slices, as they are and with lesions."""
    split = load_split(config.data.splits)
    scan = load_scan(config, split.validation[0]).volume
    volumes = [("as it is", scan), *((f"{c:+}", with_lesion(config, scan, c)) for c in (GRADE_3, -GRADE_3))]
    rows = []
    for label, volume in volumes:
        detection = detect(volume, bundle.networks.in_batches(16, lambda _: None), bundle.manifest)
        rows += [(f"{label}, slice {i}", _panels(detection, bundle, i)) for i in _heights(detection)]
    titles = ("original", "reconstruction", "counterpart", "KL map (nats)", "anomaly map")
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(9, 2.1 * len(rows)), layout="constrained")
    limits = (
        (0, 1),
        (0, 1),
        (0, 1),
        (0, 2 * bundle.manifest.kl.threshold),
        (0, 3 * bundle.manifest.residual.threshold),
    )
    for line, (label, panels) in zip(axes, rows, strict=True):
        for column, panel in enumerate(panels):
            # Rows run posterior to anterior: origin below. The patient's left is on the right, as stored.
            low, high = limits[column]
            line[column].imshow(panel, cmap="gray" if column < 3 else "inferno", vmin=low, vmax=high, origin="lower")
            line[column].set_xticks([])
            line[column].set_yticks([])
        line[0].set_ylabel(label, fontsize="small")
    for column, title in enumerate(titles):
        axes[0][column].set_title(title, fontsize="medium")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def with_lesion(config: Config, scan: Volume, contrast: float) -> Volume:
    """A validation scan with a lesion shape of validation, or with an ellipse in each picture."""
    if config.data.pictures is None:
        return insert_lesion(scan, gold_shape(load_split(config.data.splits).shapes_validation[6]), contrast, 0).volume
    ct = config.preprocessing.window is not None
    return insert_sprites(scan, SPRITE_PIXELS * config.preprocessing.spacing_mm[1], contrast, 0, ct=ct, every=1).volume


def _heights(detection: Detection) -> list[int]:
    known = np.flatnonzero(detection.analysed)
    return [int(known[int(h * len(known))]) for h in HEIGHTS]


def _panels(detection: Detection, bundle: Bundle, index: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype], ...]:
    x = detection.slices.x[index : index + 1]
    reconstruction = bundle.networks.decode(bundle.networks.encode(x))[0, 0]
    return x[0, 0], reconstruction, detection.counterpart[index], detection.kl[index], detection.anomaly[index]
