"""Experiment 1: which picture is not like the healthy ones, by one number a picture."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from app.errors import CounterpartError
from app.manifest import Manifest
from app.pipeline import diffusion, residual
from app.pipeline.detect import compare_view
from app.pipeline.diffusion import KeyedNoise, Schedule, encode_view
from app.pipeline.networks import Networks
from app.pipeline.ood import slice_scores
from app.pipeline.preprocess import analysed_slices, to_slices
from app.pipeline.residual import augment, average_views
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import load_scan
from training.experiments.cases import GRADES, RADIUS_PIXELS, Part
from training.experiments.healing import Transformer
from training.experiments.methods import BATCH
from training.experiments.metrics import (
    SENSITIVITIES,
    Counts,
    auroc,
    average_precision,
    false_positive_rate,
    interval,
)
from training.foreign import mednist_stacks
from training.lesions import insert_sprites
from training.splits import load_split

HEALTHY, NEAR = "healthy", "near"
NEAR_GRADE = "grade 2"
# METHOD's image-wise score; and what report.json has of it, before the other views are looked at.
NAMED = "KL, mean over the head"
SERVED = "KL of the plain view, mean over the head"
# Noise levels beside the KL map's own; the paper's begin at 400.
LEVELS = (100, 400)
PERCENTILES = (90, 97, 99)
ANYTHING_MM = ((0.0, 0.0, 0.0), (1e6, 1e6, 1e6))

# Slices (N, 1, H, W), foreground -> one score a picture, (N,); by name.
Scores = Callable[[FloatArray, BoolArray], dict[str, FloatArray]]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Slices of one kind.

    Attributes
    ----------
    kind : str
        "healthy", "near", or a foreign class.
    x : (N, 1, H, W) ndarray
    foreground : (N, H, W) ndarray of bool
    subjects : list of str
        Whose each is.
    refused : int
        Pictures that could not even be prepared.
    """

    kind: str
    x: FloatArray
    foreground: BoolArray
    subjects: list[str]
    refused: int = 0


def anything(manifest: Manifest) -> Manifest:
    """A manifest that prepares pictures of any size: the models are to judge them."""
    update = {"extent_mm": ANYTHING_MM, "min_foreground_cm2": 0.0}
    return manifest.model_copy(update={"preparation": manifest.preprocessing.model_copy(update=update)})


def healthy_and_near(config: Config, manifest: Manifest, part: Part) -> tuple[Pictures, Pictures]:
    """Pictures of healthy subjects, and those of the same with a sprite of grade 2, 4 to 8 pixels in radius."""
    assert config.data.pictures is not None, "the experiment is one of pictures"
    split = load_split(config.data.splits)
    plain, near = [], []
    for i, subject in enumerate(split.validation if part == "validation" else split.test):
        scan = load_scan(config, subject)
        volume = scan.volume
        slices = to_slices(volume, manifest.preprocessing)
        # Of pictures no two are neighbours: none that shows too little is judged for lying between two others.
        known = scan.known(slices, manifest.preprocessing)
        plain.append((slices.x[known], slices.foreground[known], subject))
        radius = np.random.default_rng([i, 17]).uniform(*RADIUS_PIXELS) * config.data.pictures.pixel_mm
        made = insert_sprites(volume, radius, GRADES[NEAR_GRADE] * (-1) ** i, i, every=1)
        changed = to_slices(made.volume, manifest.preprocessing)
        shown = changed.grid.sample_volume(made.truth.astype(np.float32))[known] > 0.5
        some = known[shown.any(axis=(1, 2))]
        near.append((changed.x[some], changed.foreground[some], subject))
    return _joined(HEALTHY, plain), _joined(NEAR, near)


def _joined(kind: str, parts: list[tuple[FloatArray, BoolArray, str]], refused: int = 0) -> Pictures:
    owners = [s for x, _, s in parts for _ in range(len(x))]
    return Pictures(kind, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), owners, refused)


def foreign(config: Config, manifest: Manifest) -> Iterator[Pictures]:
    """The five other classes of MedNIST, stacked like the subjects of the healthy ones."""
    opened = anything(manifest).preprocessing
    for label, stacks in groupby(mednist_stacks(config), key=lambda stack: stack.kind):
        parts, refused = [], 0
        for stack in stacks:
            try:
                slices = to_slices(stack.volume, opened)
                known = analysed_slices(slices, opened)
                parts.append((slices.x[known], slices.foreground[known], stack.name))
            except CounterpartError:
                refused += stack.volume.shape[2]
        yield _joined(label, parts, refused)


def our_scores(models: Networks, manifest: Manifest) -> Scores:
    """KL and residual as the service sees them, mean over views; and the KL at higher noise, as the paper has it."""
    s = manifest.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)

    def scores(x: FloatArray, foreground: BoolArray) -> dict[str, FloatArray]:
        kls, residuals = [], []
        found: dict[str, FloatArray] = {}
        judged = residual.erode_foreground(foreground, manifest.residual.erosion)
        for index, view in enumerate(manifest.views):
            diffusion = diffusion.Diffusion(
                schedule, models.denoise, KeyedNoise(manifest.seed, manifest.latent_shape, index)
            )
            seen = encode_view(augment(x, view), augment(foreground, view), np.arange(len(x)), models, diffusion)
            kl = diffusion.kl_map(seen.z0, seen.known, diffusion, manifest.kl.timesteps, manifest.kl.mean)
            # Pictures are no neighbours: the map is smoothed within each.
            smooth = diffusion.smooth_kl(kl, seen.foreground_latents, (0.0, *manifest.kl_sigma[1:]))
            residuals.append(compare_view(seen, smooth, models, manifest).residual)
            kls.append(residual.upsample(kl, (x.shape[2], x.shape[3])))
            if not index:
                found[SERVED] = slice_scores(smooth, seen.foreground_latents)
                for t in LEVELS:
                    level = diffusion.kl_map(seen.z0, seen.known, diffusion, (t,))
                    found |= of_map(f"KL at t = {t}", residual.upsample(level, (x.shape[2], x.shape[3])), foreground)
        found |= of_map("KL", average_views(kls, manifest.views), foreground)
        residual = residual.median_filter(average_views(residuals, manifest.views), manifest.residual.median_pixels)
        return found | of_map("residual", residual, judged)

    return scores


def of_map(name: str, values: FloatArray, head: BoolArray) -> dict[str, FloatArray]:
    """One number a picture from a map (N, H, W): means, and high percentiles of the head; NaN without a head."""
    inside = np.where(head, values, np.nan).reshape(len(values), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a picture without a head
        high = np.nanpercentile(inside, PERCENTILES, axis=1)
        mean = np.nanmean(inside, axis=1)
    named = {f"{name}, percentile {p}": v.astype(np.float32) for p, v in zip(PERCENTILES, high, strict=True)}
    picture = values.mean(axis=(1, 2))
    return {f"{name}, mean over the head": mean.astype(np.float32), f"{name}, mean over the picture": picture, **named}


def reconstruction_scores(reconstruct: Callable[[FloatArray], FloatArray]) -> Scores:
    """Of a method that makes the picture again: its error."""
    return lambda x, foreground: of_map("error", np.abs(x - reconstruct(x))[:, 0], foreground)


def likelihood_scores(made: Transformer) -> Scores:
    """Of the transformer: how unlikely the codes are, without drawing any."""

    def scores(x: FloatArray, foreground: BoolArray) -> dict[str, FloatArray]:
        surprise = -made.likelihood(torch.from_numpy(x)).numpy()
        return of_map("-log p", residual.upsample(surprise, (x.shape[2], x.shape[3])), foreground)

    return scores


@dataclass(frozen=True, eq=False)
class Scored:
    """Pictures of one kind and all their scores, (N,) each; seconds a picture."""

    pictures: Pictures
    scores: dict[str, FloatArray]
    seconds: float

    def also(self, more: dict[str, FloatArray]) -> "Scored":
        """With more scores."""
        return replace(self, scores=self.scores | more)


def score_all(scores: Scores, pictures: Pictures) -> Scored:
    """Every score of every picture."""
    start = time.perf_counter()
    parts = [
        scores(pictures.x[i : i + BATCH], pictures.foreground[i : i + BATCH])
        for i in tqdm(range(0, len(pictures.x), BATCH), desc=pictures.kind, leave=False)
    ]
    seconds = (time.perf_counter() - start) / len(pictures.x)
    return Scored(pictures, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, seconds)


def choose_score(healthy: Scored, near: Scored) -> str:
    """The one that tells validation pictures with a sprite from those without best."""
    return max(healthy.scores, key=lambda name: counted(name, near, healthy).statistic(auroc))


def counted(name: str, anomalous: Scored, healthy: Scored) -> Counts:
    """By subject: near pictures belong to the healthy ones' subjects, each foreign stack is one of its own."""
    ill, well = np.array(anomalous.pictures.subjects), np.array(healthy.pictures.subjects)
    values, truths = [], []
    for subject in sorted({*ill, *well}):
        mine, others = ill == subject, well == subject
        # A picture without anything in it is not like the healthy ones.
        both = np.concatenate([anomalous.scores[name][mine], healthy.scores[name][others]])
        values.append(np.where(np.isnan(both), np.float32(np.inf), both))
        truths.append(np.arange(len(both)) < mine.sum())
    return Counts.of(values, truths)


def judge(chosen: str, healthy: Scored, anomalous: list[Scored]) -> dict[str, Any]:
    """AUROC, AUPRC and false-positive rates of the chosen score on test pictures, by kind."""
    rows: dict[str, Any] = {"score": chosen, "seconds": healthy.seconds, "kinds": {}}
    for found in anomalous:
        counts = counted(chosen, found, healthy)
        row: dict[str, Any] = {
            "auroc": asdict(interval(counts, auroc)),
            "auprc": asdict(interval(counts, average_precision)),
        }
        row |= {f"fpr{s:g}": counts.statistic(false_positive_rate(s)) for s in SENSITIVITIES}
        every = {name: counted(name, found, healthy).statistic(auroc) for name in healthy.scores}
        if NAMED in healthy.scores:
            row["named"] = asdict(interval(counted(NAMED, found, healthy), auroc))
        rows["kinds"][found.pictures.kind] = row | {"pictures": len(found.pictures.x), "every_score": every}
    return rows
