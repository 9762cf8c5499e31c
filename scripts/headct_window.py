#!/usr/bin/env python3
"""What the pictures of MedNIST HeadCT show of themselves: the numbers of decision 15, printed.

    python -m scripts.headct_window

Below COUNTERPART_DATA (default ../shared/data). Peaks of air, brain and ventricles in grey values, and in Hounsfield
units by the window of training/configs/headct.toml; the same of the archives' GE head CT, brought to the same pixel
size; the box of the validation blocks; and how far apart by number pictures are that resemble each other most.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.ingest.reader import read_scan
from app.pipeline.prepare import FWHM_PER_SIGMA, to_slices
from app.volume import FloatArray, Volume
from training.archives import unpack
from training.config import ROOT, Config, data_root
from training.data import load_scan
from training.pictures import UInt8Array, in_units, open_pictures
from training.splits import load_split

GE = "ge_ct_head_human_28.tar.xz"
# Where bone begins, and below what a core counts as ventricle: grey values, and Hounsfield units of the GE head.
BONE_GREY, DARK_GREY = 200.0, 85.0
BONE_HU, DARK_HU = 90.0, 18.0
# This far off the bone, a pixel holds none of it; with fewer left, a picture shows base or vertex.
OFF_BONE, LEAST_PIXELS = 3, 300
LEAST_CORE = 4
# Of a histogram, in the units of its values.
SMOOTHING = 2.0
# Of the GE head, what is cut before smoothing: bone would shine into the brain.
CUT_HU = (-20.0, 120.0)
# Pictures with a share of pixels above a grey value; so many of them are compared with all.
SHOWN, SHOWN_SHARE, COMPARED = 70, 0.05, 1500


class Inside(NamedTuple):
    """Values inside closed skulls, and in their dark cores, of all pictures together."""

    skulls: int
    brain: FloatArray
    ventricles: FloatArray


def inside_skulls(stack: FloatArray, bone: float, dark: float) -> Inside:
    """Look into every picture of (N, H, W) whose bone closes around enough."""
    brain, ventricles = [], []
    for picture in stack:
        skull = picture > bone
        inner = ndimage.binary_erosion(ndimage.binary_fill_holes(skull) & ~skull, iterations=OFF_BONE)
        if inner.sum() < LEAST_PIXELS:
            continue
        brain.append(picture[inner])
        core = ndimage.binary_erosion(inner & (picture < dark))
        if core.sum() >= LEAST_CORE:
            ventricles.append(picture[core])
    empty = np.empty(0, np.float32)
    return Inside(len(brain), np.concatenate([empty, *brain]), np.concatenate([empty, *ventricles]))


def peak(values: FloatArray, step: float) -> float:
    """The most frequent value, of a histogram with this step, a little smoothed."""
    edges = np.arange(np.floor(values.min()) - step / 2, values.max() + step, step)
    counts = np.histogram(values, edges)[0].astype(np.float64)
    at = int(ndimage.gaussian_filter1d(counts, SMOOTHING / step, mode="constant").argmax())
    return float(edges[at] + step / 2)


def neighbour_distances(grey: UInt8Array, seed: int) -> npt.NDArray[np.int64]:
    """How many files lie between a picture and the one most like it (correlation), of a sample."""
    flat = grey.reshape(len(grey), -1).astype(np.float32)
    shown = np.flatnonzero((flat > SHOWN).mean(axis=1) >= SHOWN_SHARE)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    sample = np.random.default_rng(seed).choice(shown, min(COMPARED, len(shown)), replace=False)
    likeness = flat[sample] @ flat.T
    likeness[np.arange(len(sample)), sample] = -1
    distances: npt.NDArray[np.int64] = np.abs(likeness.argmax(axis=1) - sample)
    return distances


def ge_head() -> Volume:
    """The human head CT of the DICOM archives, its tilted and uneven slices resampled."""
    with TemporaryDirectory() as folder:
        unpack(data_root() / "dicom" / GE, Path(folder))
        return read_scan(Path(folder), scratch=Path(folder), geometry="resample").volume


def as_pictures(volume: Volume, pixel_mm: float) -> FloatArray:
    """Slices of a scan at another pixel size in their planes, (N, H, W)."""
    spacing = volume.spacing[:2]
    cut = np.clip(volume.array, *CUT_HU)
    smooth = ndimage.gaussian_filter(cut, (*(pixel_mm / FWHM_PER_SIGMA / spacing), 0))
    pictures: FloatArray = ndimage.zoom(smooth, (*(spacing / pixel_mm), 1), order=1, grid_mode=True, mode="nearest")
    return np.moveaxis(pictures, 2, 0)


def tell(name: str, inside: Inside, step: float, config: Config | None = None) -> None:
    """Peak, median and spread of both tissues; grey values in Hounsfield units too."""
    for what, values in (("brain", inside.brain), ("ventricles", inside.ventricles)):
        found = (peak(values, step), *np.percentile(values, (50, 5, 95)))
        units = found if config is None else in_units(np.round(found).astype(np.uint8), config)
        low, high = units[2:]
        grey = "" if config is None else f"peak {found[0]:.0f}, median {found[1]:.0f}: "
        hu = f"peak {units[0]:.1f} HU, median {units[1]:.1f}, 5 to 95 %: {low:.1f} to {high:.1f}"
        print(f"{name}, {what}: {grey}{hu} ({inside.skulls} skulls, {values.size} pixels)")


def main() -> None:
    """Print the numbers."""
    config = Config.load(ROOT / "training" / "configs" / "headct.toml")
    assert config.data.pictures is not None
    grey, pixel_mm, fit = open_pictures(config).grey, config.data.pictures.pixel_mm, config.preparation.fit
    assert fit is not None
    air, count = np.unique([np.bincount(picture.ravel()).argmax() for picture in grey], return_counts=True)
    print("MedNIST, air:", ", ".join(f"{a} in {n} pictures" for a, n in zip(air, count, strict=True)))
    tell("MedNIST", inside_skulls(grey.astype(np.float32), BONE_GREY, DARK_GREY), 1.0, config)
    ge = ge_head()
    tell("GE", inside_skulls(as_pictures(ge, pixel_mm), BONE_HU, DARK_HU), 0.5)
    rows, columns = affines.voxel_sizes(to_slices(ge, config.preparation).placement.affine)[1:]
    print(f"GE, served: pixels of {rows:.2f} x {columns:.2f} mm")

    blocks = load_split(config.data.splits).validation
    placements = [to_slices(load_scan(config, b).volume, config.training_preparation).placement for b in blocks]
    boxes = np.array([affines.voxel_sizes(p.affine)[1:] for p in placements]) * (fit.rows, fit.columns) / pixel_mm
    mean, spread = boxes.mean(axis=0), boxes.std(axis=0) / boxes.mean(axis=0)
    print(f"Box of {len(blocks)} validation blocks: {mean[0]:.1f} x {mean[1]:.1f} pixels,")
    print(f"standard deviation {spread[0]:.1%} and {spread[1]:.1%}")

    apart = neighbour_distances(grey, config.seed)
    near, between = (apart <= 33).mean(), ((apart >= 35) & (apart <= 99)).sum()
    print(f"Of {len(apart)} pictures, {near:.0%} have their most similar one within 33 files, {between} at 35 to 99")


if __name__ == "__main__":
    main()
