"""What calibration and ablation look at: a scan up to its KL map, computed once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.manifest import NoiseSchedule, Preparation, latent_sigma
from app.pipeline import anomaly
from app.pipeline.detect import smooth
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, Placement, analysed_slices, to_slices
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


def examine(volume: Volume, models: Models, config: Config) -> Examined:
    """Prepare, encode and KL-map a scan, as `detect` does."""
    d = config.detection
    preparation: Preparation = config.preparation
    slices = to_slices(volume, preparation)
    known = analysed_slices(slices, preparation)
    x, foreground = slices.x[known], slices.foreground[known]
    z0 = models.encode(x)
    latents = anomaly.latent_foreground(foreground, config.downsampling)
    kl = anomaly.kl_map(z0, known, make_diffusion(models, config), d.kl_timesteps, d.kl_mean)
    sigma = latent_sigma(d.kl_smoothing_mm, preparation, config.downsampling)
    return Examined(
        known=known,
        x=x[:, 0],
        foreground=foreground,
        z0=z0,
        latents=latents,
        kl=anomaly.smooth_kl(kl, latents, sigma),
        reconstruction=models.decode(z0)[:, 0],
        placement=slices.placement,
    )


def imagine(scan: Examined, mask: BoolArray, models: Models, config: Config) -> FloatArray:
    """The decoded counterpart; D(z0) where the mask of a slice is empty, (K, H, W)."""
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    imagined = scan.reconstruction.copy()
    if found.size:
        diffusion, steps = make_diffusion(models, config), config.detection.reverse_timesteps
        zc = anomaly.inpaint(scan.z0[found], mask[found], scan.known[found], diffusion, steps)
        imagined[found] = models.decode(zc)[:, 0]
    return imagined


def judged_map(
    scan: Examined, mask: BoolArray, imagined: FloatArray, kl_threshold: float, config: Config
) -> FloatArray:
    """The anomaly map as `detect` gives it, (K, H, W); NaN where nothing is judged."""
    d = config.detection
    reference = scan.x if d.reference == "image" else scan.reconstruction
    plain = anomaly.residual(reference, imagined, mask)
    surprise = scan.kl / np.float32(kl_threshold)
    weighed = anomaly.weigh(plain, imagined, surprise, scan.latents, d.contrast_floor, by_kl=d.weighted_by_kl)
    judged = anomaly.erode(scan.foreground, d.erosion)
    smoothed = smooth(weighed, judged, d.smoothing_mm, config.preparation.spacing_mm)
    return np.where(judged, smoothed, np.float32(np.nan))
