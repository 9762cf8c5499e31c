"""What calibration and ablation look at: a scan up to its KL map, computed once."""

from dataclasses import dataclass

import numpy as np

from app.manifest import NoiseSchedule, View, latent_sigma
from app.pipeline import diffusion, residual
from app.pipeline.diffusion import EncodedView, KeyedNoise, Schedule, decode_counterpart, encode_view
from app.pipeline.grid import SliceGrid
from app.pipeline.networks import Networks
from app.pipeline.preprocess import to_slices
from app.pipeline.residual import augment, average_views, postprocess_residual
from app.runtime.session import as_callable, open_session
from app.volume import BoolArray, FloatArray, Volume
from training.config import Config
from training.data import HealthyScan
from training.export import denoiser_graph, graphs_folder

BATCH = 16


@dataclass(frozen=True, eq=False)
class Look:
    """One view of a scan, up to its KL map.

    Attributes
    ----------
    seen : Seen
        Slices and latents.
    kl : (K, h, w) ndarray
    reconstruction : (K, H, W) ndarray
        D(z0).
    """

    seen: EncodedView
    kl: FloatArray
    reconstruction: FloatArray


@dataclass(frozen=True, eq=False)
class Examined:
    """The analysed slices of one scan, in each view.

    Attributes
    ----------
    foreground : (K, H, W) ndarray of bool
    placement : Placement
    looks : dict of View to Look
        The plain view first.
    """

    foreground: BoolArray
    grid: SliceGrid
    looks: dict[View, Look]

    @property
    def plain(self) -> Look:
        """What the scan shows as it is."""
        return self.looks[View()]


def graph_models(config: Config) -> Networks:
    """The exported graphs: thresholds come from what will be served, in int8 where a CPU gets that."""
    folder = graphs_folder(config)
    paths = (folder / "encoder.onnx", denoiser_graph(config), folder / "decoder.onnx")
    encode, denoise, decode = (as_callable(open_session(path, "cpu")) for path in paths)
    return Networks(encode, denoise, decode).in_batches(BATCH, lambda _: None)


def make_schedule(settings: NoiseSchedule) -> Schedule:
    """The noise schedule of a configuration or manifest."""
    return Schedule.linear(settings.steps, settings.beta_start, settings.beta_end)


def make_diffusion(models: Networks, config: Config, view: int = 0) -> diffusion.Diffusion:
    """The diffusion model with the noise that serving will draw by default."""
    rows, columns = config.preprocessing.shape
    f = config.downsampling
    noise = KeyedNoise(config.seed, (config.vqvae.embedding_dim, rows // f, columns // f), view)
    return diffusion.Diffusion(make_schedule(config.schedule), models.denoise, noise)


def examine(scan: Volume | HealthyScan, models: Networks, config: Config) -> Examined:
    """Prepare, encode and KL-map a scan in every view, as `detect` does; of pictures, those that are healthy."""
    healthy = scan if isinstance(scan, HealthyScan) else HealthyScan(scan)
    slices = to_slices(healthy.volume, config.training_preparation)
    known = healthy.known(slices, config.training_preparation)
    x, foreground = slices.x[known], slices.foreground[known]
    d = config.detection
    sigma = latent_sigma(d.kl_smoothing_mm, config.preprocessing, config.downsampling)
    looks = {}
    for index, view in enumerate(d.views):
        seen = encode_view(
            augment(x, view), augment(foreground, view), known, models, make_diffusion(models, config, index)
        )
        kl = diffusion.kl_map(seen.z0, known, seen.diffusion, d.kl_timesteps, d.kl_mean)
        smoothed = diffusion.smooth_kl(kl, seen.foreground_latents, sigma)
        looks[view] = Look(seen, smoothed, models.decode(seen.z0)[:, 0])
    return Examined(foreground, slices.grid, looks)


def imagine_look(look: Look, mask: BoolArray, models: Networks, timesteps: tuple[int, ...]) -> FloatArray:
    """The decoded counterpart of one view; D(z0) where the mask of a slice is empty, (K, H, W)."""
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    imagined = look.reconstruction.copy()
    if found.size:
        imagined[found] = decode_counterpart(look.seen, mask, found, models, timesteps)
    return imagined


def judged_map(
    scan: Examined, masks: list[BoolArray], imagined: list[FloatArray], kl_threshold: float, config: Config
) -> FloatArray:
    """The anomaly map as `detect` gives it, (K, H, W); NaN where nothing is judged.

    Parameters
    ----------
    masks, imagined : list of ndarray
        Of each view of the configuration, in its order.
    """
    d = config.detection

    def differs(look: Look, mask: BoolArray, counterpart: FloatArray) -> FloatArray:
        reference = look.seen.x[:, 0] if d.reference == "image" else look.reconstruction
        plain = residual.masked_residual(reference, counterpart, mask)
        surprise = look.kl / np.float32(kl_threshold)
        return residual.weight_residual(
            plain, counterpart, surprise, look.seen.foreground_latents, d.contrast_floor, by_kl=d.weighted_by_kl
        )

    looks = [scan.looks[view] for view in d.views]
    residual = average_views([differs(*each) for each in zip(looks, masks, imagined, strict=True)], d.views)
    judged = residual.erode_foreground(scan.foreground, d.erosion)
    settled = postprocess_residual(residual, scan.plain.seen.x, judged, d, config.preprocessing.spacing_mm)
    return np.where(judged, settled, np.float32(np.nan))
