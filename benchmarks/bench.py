"""A scan on the bundle's slices, and the parts of `app.pipeline.detect` as switches need them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from app.pipeline import diffusion
from app.pipeline.diffusion import EncodedView, KeyedNoise, Schedule, decode_counterpart, encode_view, smoothed_kl_map
from app.pipeline.networks import Networks
from app.pipeline.preprocess import Slices, analysed_slices
from app.pipeline.residual import augment
from app.runtime.bundle import CPU_BATCH, Bundle
from benchmarks.paper import DDIM_50

# One in so many of the paper's noise levels is measured.
THINNED = 10


@dataclass(frozen=True, eq=False)
class Bench:
    """A scan on the bundle's slices, and the networks."""

    bundle: Bundle
    slices: Slices

    @cached_property
    def networks(self) -> Networks:
        """In batches, as the service calls them."""
        return self.bundle.networks.in_batches(CPU_BATCH, lambda _: None)

    @cached_property
    def known(self) -> Any:
        """Indices of the slices that are analysed."""
        return analysed_slices(self.slices, self.bundle.manifest.preprocessing)

    def look(self, chosen: Any, view: int = 0) -> EncodedView:
        """Some slices, encoded, in one view."""
        manifest = self.bundle.manifest
        s = manifest.schedule
        noise = KeyedNoise(manifest.seed, manifest.latent_shape, view)
        schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
        diffusion = diffusion.Diffusion(schedule, self.networks.denoise, noise)
        shown = manifest.views[view]
        x, foreground = augment(self.slices.x[chosen], shown), augment(self.slices.foreground[chosen], shown)
        return encode_view(x, foreground, chosen, self.networks, diffusion)

    @cached_property
    def seen(self) -> EncodedView:
        """The analysed slices in the plain view."""
        return self.look(self.known)

    def mask(self, seen: EncodedView) -> Any:
        """Latents that the reverse process may change, by the bundle's threshold."""
        kl, manifest = smoothed_kl_map(seen, self.bundle.manifest), self.bundle.manifest
        return diffusion.latent_mask(
            kl, seen.foreground_latents, manifest.kl.threshold, manifest.kl.min_component, manifest.kl.grow
        )

    def reverse(self, seen: EncodedView, mask: Any, found: Any) -> None:
        """Imagine the slices found."""
        decode_counterpart(seen, mask, found, self.networks, self.bundle.manifest.reverse.timesteps)

    def ours(self) -> None:
        """The loop over noise levels of every view."""
        for view in range(len(self.bundle.manifest.views)):
            seen = self.look(self.known, view)
            mask = self.mask(seen)
            self.reverse(seen, mask, np.flatnonzero(mask.any(axis=(1, 2))))

    def papers(self) -> None:
        """One in `THINNED` of the paper's noise levels, on one batch."""
        some = self.known[:CPU_BATCH]
        seen, plan = self.look(some), DDIM_50.thinned(THINNED)
        diffusion.kl_map(seen.z0, some, seen.diffusion, plan.kl)
        diffusion.inpaint(seen.z0, seen.foreground_latents, some, seen.diffusion, plan.reverse)
