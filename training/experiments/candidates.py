"""METHOD's candidates beyond the paper, and the paper's own rules: each changes one thing that a bundle does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.regression import compute_ssim_and_cs

from app.manifest import KlMap, Manifest, Residual, View
from app.pipeline import diffusion, residual
from app.pipeline.detect import compare_view
from app.pipeline.diffusion import EncodedView, KeyedNoise, Schedule, encode_view, smoothed_kl_map
from app.pipeline.networks import Networks
from app.pipeline.residual import augment, average_views, postprocess_residual
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
PERCENTILES = (80.0, 90.0, 95.0, 97.5)
MEDIANS = {"no median": 1, "median of 3 pixels": 3, "median of 5 pixels": 5}
GROWN = {"mask not grown": 0, "mask grown by one latent": 1, "mask grown by two latents": 2}
# METHOD: of the healthy slices, so many should come out with an empty mask.
PLAIN_EMPTY = 0.8
PAPER_LEVELS, PAPER_STEPS, PAPER_PERCENTILE = (400, 450, 500, 550, 600), (500, 400, 300, 200, 100, 50), 97.5

# What differs in one view, (K, H, W), from its slices and their KL map.
Differs = Callable[[EncodedView, FloatArray, Networks, Manifest], FloatArray]


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

    def map(self, case: Case, models: Networks) -> FloatArray:
        """The anomaly map of the judged slices of a case, as `detect` makes it but for the change, (K, H, W)."""
        manifest = self.manifest
        found = [
            self.differs(seen, smoothed_kl_map(seen, manifest), models, manifest)
            for _, seen in seen_in_views(case, models, manifest)
        ]
        inner = residual.erode_foreground(case.foreground, manifest.residual.erosion)
        settled = postprocess_residual(
            average_views(found, manifest.views), case.x, inner, manifest.residual, manifest.preprocessing.spacing_mm
        )
        return settled if self.after is None else self.after(settled)


def seen_in_views(case: Case, models: Networks, manifest: Manifest) -> Iterator[tuple[View, EncodedView]]:
    """The judged slices of a case in each view of the bundle, encoded, with the noise of serving."""
    s = manifest.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
    for index, view in enumerate(manifest.views):
        noise = KeyedNoise(manifest.seed, manifest.latent_shape, index)
        diffusion = diffusion.Diffusion(schedule, models.denoise, noise)
        yield view, encode_view(augment(case.x, view), augment(case.foreground, view), case.known, models, diffusion)


def residual(seen: EncodedView, kl: FloatArray, models: Networks, manifest: Manifest) -> FloatArray:
    """As served."""
    return compare_view(seen, kl, models, manifest).residual


def second_look(seen: EncodedView, kl: FloatArray, models: Networks, manifest: Manifest) -> FloatArray:
    """The counterpart is looked at again: what of a lesion was left in it is imagined away too (THOR; MAD-AD)."""
    mask = compare_view(seen, kl, models, manifest).mask
    healed = diffusion.inpaint(seen.z0, mask, seen.known, seen.diffusion, manifest.reverse.timesteps)
    return residual(seen, np.maximum(kl, smoothed_kl_map(replace(seen, z0=healed), manifest)), models, manifest)


def kl_alone(seen: EncodedView, kl: FloatArray, _models: Networks, _manifest: Manifest) -> FloatArray:
    """The KL map, up-sampled: no counterpart (ANDi, arXiv 2312.01904)."""
    return residual.upsample(np.where(seen.foreground_latents, kl, np.float32(0)), seen.x.shape[2:])


def structural(seen: EncodedView, kl: FloatArray, models: Networks, manifest: Manifest) -> FloatArray:
    """1 - SSIM of slices and counterparts, mean over window sizes; as it is where nothing was imagined, 0."""
    pair = [torch.from_numpy(v)[:, None] for v in (seen.x[:, 0], compare_view(seen, kl, models, manifest).counterpart)]
    unlike = []
    for size in WINDOWS:
        padded = [torch.nn.functional.pad(v, (size // 2,) * 4, mode="reflect") for v in pair]
        ssim, _ = compute_ssim_and_cs(*padded, 2, (size, size), (1.0, 1.0), kernel_type="uniform")
        unlike.append(1 - ssim[:, 0])
    mean: FloatArray = torch.stack(unlike).mean(0).numpy()
    return mean


def brighter(seen: EncodedView, kl: FloatArray, models: Networks, manifest: Manifest) -> FloatArray:
    """Where the slice is brighter than its counterpart, and nowhere else."""
    found = compare_view(seen, kl, models, manifest)
    return np.where(seen.x[:, 0] > found.counterpart, found.residual, np.float32(0))


class Changes:
    """What may be changed in a bundle's decisions, one thing at a time.

    KL thresholds come from the KL maps of healthy validation scans, as in calibration.
    """

    def __init__(self, own: Manifest, config: Config, models: Networks) -> None:
        self.own = own
        self._config = config
        self._models = models
        self._healthy: dict[tuple[tuple[int, ...], float], list[Examined]] = {}

    def healthy(self, kl: KlMap) -> list[Examined]:
        """Healthy validation scans, with their KL maps at these noise levels."""
        key = (kl.timesteps, kl.smoothing_mm)
        if key not in self._healthy:
            changed = {"kl_timesteps": kl.timesteps, "kl_smoothing_mm": kl.smoothing_mm, "views": (View(),)}
            detection = self._config.detection.model_copy(update=changed)
            asked = self._config.model_copy(update={"detection": detection})
            subjects = load_split(self._config.data.splits).validation
            self._healthy[key] = [examine(load_scan(asked, s), self._models, asked) for s in subjects]
        return self._healthy[key]

    def kl(self, **changes: Any) -> KlMap:
        """The KL map changed, with the threshold that belongs to it; one that is named stays."""
        kl = self.own.kl.model_copy(update=changes)
        if {"timesteps", "smoothing_mm", "percentile"} & set(changes):
            threshold = kl_threshold(self.healthy(kl), kl.percentile)
            kl = kl.model_copy(update={"threshold": significant(threshold)})
        return kl

    def emptied(self) -> KlMap | None:
        """METHOD's plain rule; None where no size of component that is tried leaves enough slices empty."""
        component = next(components(self.healthy(self.own.kl), self.own.kl.threshold, PLAIN_EMPTY), None)
        return None if component is None else self.kl(min_component=component)

    def residual(self, **changes: Any) -> Residual:
        """The residual changed."""
        return self.own.residual.model_copy(update=changes)

    def manifest(self, **parts: Any) -> Manifest:
        """The bundle's, with other parts."""
        return self.own.model_copy(update=parts)

    def paper(self) -> Manifest:
        """The paper's levels and steps, one view, and the plain residual."""
        return self.manifest(
            views=(View(),),
            kl=self.kl(timesteps=PAPER_LEVELS, smoothing_mm=0.0, percentile=PAPER_PERCENTILE, grow=0),
            reverse=self.own.reverse.model_copy(update={"timesteps": PAPER_STEPS}),
            residual=self.residual(
                contrast_floor=0.0,
                weighted_by_kl=False,
                weighted_by_intensity=False,
                median_pixels=1,
                smoothing_mm=0.0,
            ),
        )


def candidates(own: Manifest, config: Config, models: Networks) -> dict[str, Candidate]:
    """By what is changed; `AS_SHIPPED` first, what the others are compared with."""
    changes = Changes(own, config, models)
    manifests = {
        AS_SHIPPED: own,
        **{name: changes.manifest(kl=kl) for name, kl in masks(changes).items()},
        **{name: changes.manifest(residual=settings) for name, settings in residuals(changes).items()},
        "the plain view alone": changes.manifest(views=own.views[:1]),
        f"{DRAWS} draws of the plain view": changes.manifest(views=own.views[:1] * DRAWS),
        "the paper's levels, steps and rules": changes.paper(),
    }
    return {name: Candidate(manifest, residual) for name, manifest in manifests.items()} | {
        "a second look at the counterpart": Candidate(own, second_look),
        "the KL map alone": Candidate(own, kl_alone),
        "1 - SSIM in place of the residual": Candidate(own, structural),
        "Gaussian of 1 pixel": Candidate(own, residual, lambda found: gaussian(found, 1.0)),
        "where it is brighter alone": Candidate(own, brighter),
    }


def masks(changes: Changes) -> dict[str, KlMap]:
    """Other latent masks."""
    own = changes.own.kl
    emptied = changes.emptied()
    return {
        **{f"KL percentile {p:g}": changes.kl(percentile=p) for p in PERCENTILES if p != own.percentile},
        **{name: changes.kl(grow=grow) for name, grow in GROWN.items() if grow != own.grow},
        "everything may change": changes.kl(threshold=-1.0),
        "KL map not smoothed": changes.kl(smoothing_mm=0.0),
        **({} if emptied is None else {f"{PLAIN_EMPTY:.0%} of healthy slices empty": emptied}),
    }


def residuals(changes: Changes) -> dict[str, Residual]:
    """Other ways to weigh and to smooth what differs."""
    own = changes.own.residual
    floor = 0.0 if own.contrast_floor else CONTRAST_FLOOR
    bright = own.weighted_by_intensity
    return {
        "weighted by the KL": changes.residual(weighted_by_kl=not own.weighted_by_kl),
        "against the reconstruction": changes.residual(reference="reconstruction"),
        f"{'not ' if not floor else ''}over local contrast": changes.residual(contrast_floor=floor),
        f"{'not ' if bright else ''}times the intensity": changes.residual(weighted_by_intensity=not bright),
        **{name: changes.residual(median_pixels=p) for name, p in MEDIANS.items() if p != own.median_pixels},
    }


class Remembering:
    """A bundle's networks, each asked once of the same arrays: most candidates ask for the same."""

    def __init__(self, models: Networks) -> None:
        self._known: dict[tuple[str, ...], FloatArray] = {}
        self._asked = models
        self.networks = Networks(
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
