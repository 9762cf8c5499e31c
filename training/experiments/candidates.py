"""METHOD's candidates beyond the paper, and the paper's own rules: each changes one thing that a bundle does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.regression import compute_ssim_and_cs

from app.manifest import Manifest, View
from app.pipeline import anomaly
from app.pipeline.detect import Seen, compare, mean_view, see, settle, surprise
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.schedule import Schedule
from app.pipeline.views import turn
from app.volume import FloatArray
from training.calibrate import components, kl_threshold, significant
from training.config import Config
from training.data import load_scan
from training.examine import Examined, examine
from training.experiments.cases import Case
from training.experiments.methods import CONTRAST_FLOOR, gaussian
from training.splits import load_split

AS_SHIPPED = "as shipped"
# Pixels, of structural similarity.
WINDOWS = (3, 5, 7)
DRAWS = 4
GROWN = {"mask not grown": 0, "mask grown by one latent": 1, "mask grown by two latents": 2}
# METHOD: of the healthy slices, so many should come out with an empty mask.
PLAIN_EMPTY = 0.8
PAPER_LEVELS, PAPER_STEPS, PAPER_PERCENTILE = (400, 450, 500, 550, 600), (500, 400, 300, 200, 100, 50), 97.5

# What differs in one view, (K, H, W), from its slices and their KL map.
Differs = Callable[[Seen, FloatArray, Models, Manifest], FloatArray]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One change.

    Attributes
    ----------
    manifest : Manifest
        The bundle's decisions, one of them changed.
    differs : callable
        What differs in a view; `detect`'s own by default.
    after : callable, optional
        Of the finished map (K, H, W).
    """

    manifest: Manifest
    differs: Differs
    after: Callable[[FloatArray], FloatArray] | None = None

    def map(self, case: Case, models: Models) -> FloatArray:
        """The anomaly map of the judged slices of a case, as `detect` makes it but for the change, (K, H, W)."""
        manifest = self.manifest
        found = [
            self.differs(seen, surprise(seen, manifest), models, manifest)
            for _, seen in seen_in_views(case, models, manifest)
        ]
        inner = anomaly.erode(case.foreground, manifest.residual.erosion)
        settled = settle(mean_view(found, manifest.views), case.x, inner, manifest)
        return settled if self.after is None else self.after(settled)


def seen_in_views(case: Case, models: Models, manifest: Manifest) -> Iterator[tuple[View, Seen]]:
    """The judged slices of a case in each view of the bundle, encoded, with the noise of serving."""
    s = manifest.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
    for index, view in enumerate(manifest.views):
        noise = KeyedNoise(manifest.seed, manifest.latent_shape, index)
        diffusion = anomaly.Diffusion(schedule, models.denoise, noise)
        yield view, see(turn(case.x, view), turn(case.foreground, view), case.known, models, diffusion)


def residual(seen: Seen, kl: FloatArray, models: Models, manifest: Manifest) -> FloatArray:
    """As served."""
    return compare(seen, kl, models, manifest).residual


def second_look(seen: Seen, kl: FloatArray, models: Models, manifest: Manifest) -> FloatArray:
    """The counterpart is looked at again: what of a lesion was left in it is imagined away too (THOR; MAD-AD)."""
    mask = compare(seen, kl, models, manifest).mask
    healed = anomaly.inpaint(seen.z0, mask, seen.known, seen.diffusion, manifest.reverse.timesteps)
    return residual(seen, np.maximum(kl, surprise(replace(seen, z0=healed), manifest)), models, manifest)


def kl_alone(seen: Seen, kl: FloatArray, _models: Models, _manifest: Manifest) -> FloatArray:
    """The KL map, up-sampled: no counterpart (ANDi, arXiv 2312.01904)."""
    return anomaly.upsample(np.where(seen.latents, kl, np.float32(0)), seen.x.shape[2:])


def structural(seen: Seen, kl: FloatArray, models: Models, manifest: Manifest) -> FloatArray:
    """1 - SSIM of slices and counterparts, mean over window sizes; as it is where nothing was imagined, 0."""
    pair = [torch.from_numpy(v)[:, None] for v in (seen.x[:, 0], compare(seen, kl, models, manifest).counterpart)]
    unlike = []
    for size in WINDOWS:
        padded = [torch.nn.functional.pad(v, (size // 2,) * 4, mode="reflect") for v in pair]
        ssim, _ = compute_ssim_and_cs(*padded, 2, (size, size), (1.0, 1.0), kernel_type="uniform")
        unlike.append(1 - ssim[:, 0])
    mean: FloatArray = torch.stack(unlike).mean(0).numpy()
    return mean


def brighter(seen: Seen, kl: FloatArray, models: Models, manifest: Manifest) -> FloatArray:
    """Where the slice is brighter than its counterpart, and nowhere else."""
    found = compare(seen, kl, models, manifest)
    return np.where(seen.x[:, 0] > found.counterpart, found.residual, np.float32(0))


def candidates(own: Manifest, config: Config, models: Models) -> dict[str, Candidate]:
    """By what is changed; `AS_SHIPPED` first.

    KL thresholds come from the KL maps of healthy validation scans, as in calibration.
    """

    @cache
    def healthy(levels: tuple[int, ...], smoothing_mm: float) -> list[Examined]:
        changed = {"kl_timesteps": levels, "kl_smoothing_mm": smoothing_mm, "views": (View(),)}
        asked = config.model_copy(update={"detection": config.detection.model_copy(update=changed)})
        return [examine(load_scan(config, s), models, asked) for s in load_split(config.data.splits).validation]

    def with_kl(manifest: Manifest, **changes: Any) -> Manifest:
        kl = manifest.kl.model_copy(update=changes)
        decides = {"timesteps", "smoothing_mm", "percentile"} & set(changes)
        if decides:
            threshold = kl_threshold(healthy(kl.timesteps, kl.smoothing_mm), kl.percentile)
            kl = kl.model_copy(update={"threshold": significant(threshold)})
        return manifest.model_copy(update={"kl": kl})

    def with_residual(**changes: Any) -> Manifest:
        return own.model_copy(update={"residual": own.residual.model_copy(update=changes)})

    def plain(manifest: Manifest) -> Candidate:
        return Candidate(manifest, residual)

    weighed = {"contrast_floor": 0.0, "weighted_by_kl": False, "weighted_by_intensity": False}
    paper = with_residual(**weighed, median_pixels=1, smoothing_mm=0.0)
    reverse = own.reverse.model_copy(update={"timesteps": PAPER_STEPS})
    paper = paper.model_copy(update={"views": (View(),), "reverse": reverse})
    paper = with_kl(paper, timesteps=PAPER_LEVELS, smoothing_mm=0.0, percentile=PAPER_PERCENTILE, grow=0)
    alone = healthy(own.kl.timesteps, own.kl.smoothing_mm)
    # Where nothing that is tried leaves so many slices empty, there is no such candidate.
    component = next(components(alone, own.kl.threshold, PLAIN_EMPTY), None)
    floor = 0.0 if own.residual.contrast_floor else CONTRAST_FLOOR
    bright = own.residual.weighted_by_intensity
    made = {
        AS_SHIPPED: plain(own),
        **{
            f"KL percentile {p:g}": plain(with_kl(own, percentile=p))
            for p in (80.0, 90.0, 95.0, 97.5)
            if p != own.kl.percentile
        },
        **{name: plain(with_kl(own, grow=grow)) for name, grow in GROWN.items() if grow != own.kl.grow},
        "everything may change": plain(own.model_copy(update={"kl": own.kl.model_copy(update={"threshold": -1.0})})),
        "a second look at the counterpart": Candidate(own, second_look),
        "KL map not smoothed": plain(with_kl(own, smoothing_mm=0.0)),
        "the KL map alone": Candidate(own, kl_alone),
        "weighted by the KL": plain(with_residual(weighted_by_kl=not own.residual.weighted_by_kl)),
        "against the reconstruction": plain(with_residual(reference="reconstruction")),
        f"{'not ' if not floor else ''}over local contrast": plain(with_residual(contrast_floor=floor)),
        "1 - SSIM in place of the residual": Candidate(own, structural),
        **{
            f"median of {p} pixels" if p > 1 else "no median": plain(with_residual(median_pixels=p))
            for p in (1, 3, 5)
            if p != own.residual.median_pixels
        },
        "Gaussian of 1 pixel": Candidate(own, residual, lambda found: gaussian(found, 1.0)),
        "where it is brighter alone": Candidate(own, brighter),
        f"{'not ' if bright else ''}times the intensity": plain(with_residual(weighted_by_intensity=not bright)),
        "the plain view alone": plain(own.model_copy(update={"views": own.views[:1]})),
        f"{DRAWS} draws of the plain view": plain(own.model_copy(update={"views": own.views[:1] * DRAWS})),
        "the paper's levels, steps and rules": plain(paper),
    }
    if component is not None:
        made[f"{PLAIN_EMPTY:.0%} of healthy slices empty"] = plain(with_kl(own, min_component=component))
    assert next(iter(made)) == AS_SHIPPED, "the first is what the others are compared with"
    return made


class Remembering:
    """A bundle's networks, each asked once of the same arrays: most candidates ask for the same."""

    def __init__(self, models: Models) -> None:
        self._known: dict[tuple[str, ...], FloatArray] = {}
        self._asked = models
        self.models = Models(
            encode=lambda x: self._ask("encode", x),
            denoise=lambda z_t, t: self._ask("denoise", z_t, t),
            decode=lambda z0: self._ask("decode", z0),
        )

    def _ask(self, network: str, *arrays: npt.NDArray[Any]) -> FloatArray:
        key = (network, *(f"{a.shape} {sha256(a.tobytes()).hexdigest()}" for a in arrays))
        if key not in self._known:
            self._known[key] = getattr(self._asked, network)(*arrays)
        return self._known[key].copy()

    def forget(self) -> None:
        """Before the next case."""
        self._known.clear()
