"""Slices as one view shows them to the networks, up to their KL map."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.manifest import Manifest
from app.pipeline import anomaly
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray


@dataclass(frozen=True, eq=False)
class Seen:
    """Slices as one view shows them, and what they are to the networks.

    Attributes
    ----------
    x : (K, 1, H, W) ndarray
    foreground : (K, H, W) ndarray of bool
    known : (K,) ndarray of int
        Indices of the slices in the scan's stack: keys of the noise.
    z0 : (K, C, h, w) ndarray
    latents : (K, h, w) ndarray of bool
        Foreground latents.
    diffusion : Diffusion
        With the noise of this view.
    """

    x: FloatArray
    foreground: BoolArray
    known: npt.NDArray[np.int64]
    z0: FloatArray
    latents: BoolArray
    diffusion: anomaly.Diffusion


def see(
    x: FloatArray, foreground: BoolArray, known: npt.NDArray[np.int64], models: Models, diffusion: anomaly.Diffusion
) -> Seen:
    """Encode the slices of one view."""
    z0 = models.encode(x)
    latents = anomaly.latent_foreground(foreground, x.shape[-1] // z0.shape[-1])
    return Seen(x, foreground, known, z0, latents, diffusion)


def surprise(seen: Seen, manifest: Manifest) -> FloatArray:
    """KL map of one view, smoothed as the manifest says, (K, h, w)."""
    kl = anomaly.kl_map(seen.z0, seen.known, seen.diffusion, manifest.kl.timesteps, manifest.kl.mean)
    return anomaly.smooth_kl(kl, seen.latents, manifest.kl_sigma)
