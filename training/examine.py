"""What calibration and ablation look at: a scan up to its KL map, computed once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.manifest import NoiseSchedule, Preparation
from app.pipeline import anomaly
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, Placement, foreground_cm2, to_slices
from app.pipeline.schedule import Schedule
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray, Volume
from training.config import Config
from training.export import graphs_folder

BATCH = 16


@dataclass(frozen=True, eq=False)
class Examined:
    """The analysed slices of one scan.

    Attributes
    ----------
    known : (K,) ndarray of int
        Indices of the analysed slices.
    x, foreground : (K, H, W) ndarray
    z0 : (K, C, h, w) ndarray
    latents : (K, h, w) ndarray of bool
        Foreground latents.
    kl : (K, h, w) ndarray
    reconstruction : (K, H, W) ndarray
        D(z0).
    placement : Placement
    """

    known: npt.NDArray[np.int64]
    x: FloatArray
    foreground: BoolArray
    z0: FloatArray
    latents: BoolArray
    kl: FloatArray
    reconstruction: FloatArray
    placement: Placement


def graph_models(config: Config) -> Models:
    """The exported graphs: thresholds come from what will be served."""
    folder = graphs_folder(config)
    encode, denoise, decode = (
        as_callable(open_session(folder / f"{name}.onnx", "cpu")) for name in ("encoder", "denoiser", "decoder")
    )
    return Models(encode, denoise, decode).in_batches(BATCH, lambda _: None)


def make_schedule(settings: NoiseSchedule) -> Schedule:
    """The noise schedule of a configuration or manifest."""
    return Schedule.linear(settings.steps, settings.beta_start, settings.beta_end)


def make_diffusion(models: Models, config: Config) -> anomaly.Diffusion:
    """The diffusion model with the noise that serving will draw by default."""
    rows, columns = config.preparation.shape
    f = config.downsampling
    noise = KeyedNoise(config.seed, (config.vqvae.embedding_dim, rows // f, columns // f))
    return anomaly.Diffusion(make_schedule(config.schedule), models.denoise, noise)


def examine(volume: Volume, models: Models, config: Config, timesteps: tuple[int, ...]) -> Examined:
    """Prepare, encode and KL-map a scan, as `detect` does."""
    preparation: Preparation = config.preparation
    slices = to_slices(volume, preparation)
    known = np.flatnonzero(foreground_cm2(slices, preparation) >= preparation.min_foreground_cm2)
    x, foreground = slices.x[known], slices.foreground[known]
    z0 = models.encode(x)
    kl = anomaly.kl_map(z0, known, make_diffusion(models, config), timesteps)
    return Examined(
        known=known,
        x=x[:, 0],
        foreground=foreground,
        z0=z0,
        latents=anomaly.latent_foreground(foreground, config.downsampling),
        kl=kl,
        reconstruction=models.decode(z0)[:, 0],
        placement=slices.placement,
    )


def residual_map(
    scan: Examined, mask: BoolArray, models: Models, config: Config, timesteps: tuple[int, ...]
) -> dict[str, FloatArray]:
    """Unsmoothed residuals against the image and against the reconstruction, (K, H, W) each."""
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    maps = {"image": np.zeros_like(scan.x), "reconstruction": np.zeros_like(scan.x)}
    if found.size:
        diffusion = make_diffusion(models, config)
        zc = anomaly.inpaint(scan.z0[found], mask[found], scan.known[found], diffusion, timesteps)
        imagined = models.decode(zc)[:, 0]
        for name, reference in (("image", scan.x), ("reconstruction", scan.reconstruction)):
            maps[name][found] = anomaly.residual(reference[found], imagined, mask[found])
    return maps
