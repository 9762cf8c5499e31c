"""Experiment 1: separation of healthy images from other images by one score for each image."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

from app.errors import CounterpartError
from app.manifest import Manifest
from app.pipeline import diffusion
from app.pipeline.detect import compare_view
from app.pipeline.diffusion import KeyedNoise, Networks, Schedule, encode_view
from app.pipeline.out_of_distribution import slice_scores
from app.pipeline.preprocess import analysed_slices, to_slices
from app.pipeline.scores import augment, average_views, erode_foreground, median_filter, smooth_kl, upsample
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import load_scan, load_split
from training.experiments.cases import GRADES, RADIUS_PIXELS, Part
from training.experiments.manifests import without_size_check
from training.experiments.metrics import (
    SENSITIVITIES,
    ScoreCounts,
    auroc,
    average_precision,
    bootstrap_interval,
    fpr_at_sensitivity,
)
from training.experiments.resampling import CodeResampler
from training.experiments.results import KindScores
from training.experiments.segmentation import BATCH
from training.external_scans import mednist_stacks
from training.lesion_insertion import insert_ellipses

HEALTHY, NEAR = "healthy", "near"
NEAR_GRADE = "grade 2"
# The image-level score of `docs/method.md`, and the score of report.json, which uses only the identity view.
MEAN_KL = "KL, mean over the head"
REPORTED = "KL of the plain view, mean over the head"
# Noise levels in addition to those of the bundle. Those of the paper begin at 400.
LEVELS = (100, 400)
PERCENTILES = (90, 97, 99)

# Slices (N, 1, H, W), foreground (N, H, W) -> scores (N,) by name.
ImageScores = Callable[[FloatArray, BoolArray], dict[str, FloatArray]]


@dataclass(frozen=True, eq=False)
class Images:
    """Slices of one kind.

    Attributes
    ----------
    kind : str
        "healthy", "near", or a class of images of another body part.
    x : (N, 1, H, W) ndarray
    foreground : (N, H, W) ndarray of bool
    subjects : list of str
        Subject of each slice.
    """

    kind: str
    x: FloatArray
    foreground: BoolArray
    subjects: list[str]


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """Images of one kind with their scores, (N,) each, and the seconds of one image."""

    images: Images
    scores: dict[str, FloatArray]
    seconds: float


def load_healthy_and_near(config: Config, manifest: Manifest, part: Part) -> tuple[Images, Images]:
    """Load images of healthy subjects, and the same with an ellipse of grade 2 (near-OOD)."""
    assert config.data.image_archive is not None, "the experiment needs a bundle of 2-D images"
    split = load_split(config.data.splits)
    healthy, near = [], []
    for i, subject in enumerate(split.validation if part == "validation" else split.test):
        scan = load_scan(config, subject)
        slices = to_slices(scan.volume, manifest.preprocessing)
        # Pictures are no neighbours: one with too little foreground is left out even between two others.
        known = scan.usable_slices(slices, manifest.preprocessing)
        healthy.append((slices.x[known], slices.foreground[known], subject))
        radius = np.random.default_rng([i, 17]).uniform(*RADIUS_PIXELS) * config.data.image_archive.pixel_mm
        made = insert_ellipses(scan.volume, radius, GRADES[NEAR_GRADE] * (-1) ** i, i, every=1)
        changed = to_slices(made.volume, manifest.preprocessing)
        lesion = changed.grid.sample_volume(made.truth.astype(np.float32))[known] > 0.5
        some = known[lesion.any(axis=(1, 2))]
        near.append((changed.x[some], changed.foreground[some], subject))
    return _join(HEALTHY, healthy), _join(NEAR, near)


def _join(kind: str, parts: list[tuple[FloatArray, BoolArray, str]]) -> Images:
    subjects = [subject for x, _, subject in parts for _ in range(len(x))]
    return Images(kind, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), subjects)


def load_far(config: Config, manifest: Manifest) -> Iterator[Images]:
    """Yield the five MedNIST classes of other body parts (far-OOD), in stacks like those of the healthy subjects."""
    preparation = without_size_check(manifest).preprocessing
    for label, stacks in groupby(mednist_stacks(config), key=lambda stack: stack.kind):
        parts = []
        for stack in stacks:
            try:
                slices = to_slices(stack.volume, preparation)
            except CounterpartError:
                continue
            known = analysed_slices(slices, preparation)
            parts.append((slices.x[known], slices.foreground[known], stack.name))
        yield _join(label, parts)


def counterpart_scores(models: Networks, manifest: Manifest) -> ImageScores:
    """Return KL and residual as served, mean over views, and the KL at the higher noise levels of `LEVELS`."""
    schedule = Schedule.from_settings(manifest.schedule)

    def scores(x: FloatArray, foreground: BoolArray) -> dict[str, FloatArray]:
        kls, residuals = [], []
        found: dict[str, FloatArray] = {}
        shape, indices = (x.shape[2], x.shape[3]), np.arange(len(x))
        for index, view in enumerate(manifest.views):
            noise = KeyedNoise(manifest.seed, manifest.latent_shape, index)
            process = diffusion.Diffusion(schedule, models.denoise, noise)
            encoded_view = encode_view(augment(x, view), augment(foreground, view), indices, models, process)
            kl = diffusion.kl_map(encoded_view.z0, indices, process, manifest.kl.timesteps, manifest.kl.mean)
            # Pictures are no neighbours: smooth within each.
            smooth = smooth_kl(kl, encoded_view.foreground_latents, (0.0, *manifest.kl_sigma[1:]))
            residuals.append(compare_view(encoded_view, smooth, models, manifest).residual)
            kls.append(upsample(kl, shape))
            if not index:
                found[REPORTED] = slice_scores(smooth, encoded_view.foreground_latents)
                for t in LEVELS:
                    level = diffusion.kl_map(encoded_view.z0, indices, process, (t,))
                    found |= summarise(f"KL at t = {t}", upsample(level, shape), foreground)
        found |= summarise("KL", average_views(kls, manifest.views), foreground)
        filtered = median_filter(average_views(residuals, manifest.views), manifest.residual.median_pixels)
        return found | summarise("residual", filtered, erode_foreground(foreground, manifest.residual.erosion))

    return scores


def summarise(name: str, values: FloatArray, head: BoolArray) -> dict[str, FloatArray]:
    """Return means and high percentiles of maps (N, H, W), by name, (N,) each; NaN for an image without a head."""
    inside = np.where(head, values, np.nan).reshape(len(values), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an image without a head has no values
        high = np.nanpercentile(inside, PERCENTILES, axis=1)
        mean = np.nanmean(inside, axis=1)
    percentiles = {f"{name}, percentile {p}": v.astype(np.float32) for p, v in zip(PERCENTILES, high, strict=True)}
    means = {
        f"{name}, mean over the head": mean.astype(np.float32),
        f"{name}, mean over the image": values.mean(axis=(1, 2)),
    }
    return means | percentiles


def reconstruction_scores(reconstruct: Callable[[FloatArray], FloatArray]) -> ImageScores:
    """Return summaries of a method's reconstruction error."""
    return lambda x, foreground: summarise("error", np.abs(x - reconstruct(x))[:, 0], foreground)


def likelihood_scores(resampler: CodeResampler) -> ImageScores:
    """Return summaries of the transformer's negative log-likelihood of the codes."""

    def scores(x: FloatArray, foreground: BoolArray) -> dict[str, FloatArray]:
        negative = -resampler.log_likelihood(resampler.encode(torch.from_numpy(x))).numpy()
        return summarise("-log p", upsample(negative, (x.shape[2], x.shape[3])), foreground)

    return scores


def score_images(scores: ImageScores, images: Images) -> ScoredImages:
    """Compute all scores of images."""
    start = time.perf_counter()
    parts = [
        scores(images.x[i : i + BATCH], images.foreground[i : i + BATCH])
        for i in tqdm(range(0, len(images.x), BATCH), desc=images.kind, leave=False)
    ]
    seconds = (time.perf_counter() - start) / len(images.x)
    return ScoredImages(images, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, seconds)


def choose_score(healthy: ScoredImages, near: ScoredImages) -> str:
    """Choose the score with the highest AUROC between near and healthy validation images."""
    return max(healthy.scores, key=lambda name: count_scores(name, near, healthy).pooled(auroc))


def count_scores(name: str, anomalous: ScoredImages, healthy: ScoredImages) -> ScoreCounts:
    """Count a score by subject. A near image belongs to the subject that it was made from."""
    owners, healthy_owners = np.array(anomalous.images.subjects), np.array(healthy.images.subjects)
    values, truths = [], []
    for subject in sorted({*owners, *healthy_owners}):
        mine, others = owners == subject, healthy_owners == subject
        both = np.concatenate([anomalous.scores[name][mine], healthy.scores[name][others]])
        # NaN: an image without a head is as anomalous as can be.
        values.append(np.where(np.isnan(both), np.float32(np.inf), both))
        truths.append(np.arange(len(both)) < mine.sum())
    return ScoreCounts.from_scores(values, truths)


def evaluate(chosen: str, healthy: ScoredImages, anomalous: list[ScoredImages]) -> dict[str, KindScores]:
    """Evaluate a score on test images, by kind."""
    kinds = {}
    for found in anomalous:
        counts = count_scores(chosen, found, healthy)
        every = {name: count_scores(name, found, healthy) for name in healthy.scores}
        kinds[found.images.kind] = KindScores(
            auroc=bootstrap_interval(counts, auroc),
            auprc=bootstrap_interval(counts, average_precision),
            false_positive_rate={f"{s:g}": counts.pooled(fpr_at_sensitivity(s)) for s in SENSITIVITIES},
            images=len(found.images.x),
            auroc_by_score={name: each.pooled(auroc) for name, each in every.items()},
            mean_kl_auroc=bootstrap_interval(every[MEAN_KL], auroc) if MEAN_KL in every else None,
        )
    return kinds
