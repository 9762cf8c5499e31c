"""What calibration and ablation look at: a scan up to its KL map, computed once."""

from dataclasses import dataclass

import numpy as np

from app.manifest import NoiseSchedule, View, latent_sigma
from app.pipeline import anomaly
from app.pipeline.detect import imagine, mean_view, settle
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.placement import Placement
from app.pipeline.prepare import BoolArray, to_slices
from app.pipeline.schedule import Schedule
from app.pipeline.seen import Seen, see
from app.pipeline.views import turn
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray, Volume
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

    seen: Seen
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
    placement: Placement
    looks: dict[View, Look]

    @property
    def plain(self) -> Look:
        """What the scan shows as it is."""
        return self.looks[View()]


def graph_models(config: Config) -> Models:
    """The exported graphs: thresholds come from what will be served, in int8 where a CPU gets that."""
    folder = graphs_folder(config)
    paths = (folder / "encoder.onnx", denoiser_graph(config), folder / "decoder.onnx")
    encode, denoise, decode = (as_callable(open_session(path, "cpu")) for path in paths)
    return Models(encode, denoise, decode).in_batches(BATCH, lambda _: None)


def make_schedule(settings: NoiseSchedule) -> Schedule:
    """The noise schedule of a configuration or manifest."""
    return Schedule.linear(settings.steps, settings.beta_start, settings.beta_end)


def make_diffusion(models: Models, config: Config, view: int = 0) -> anomaly.Diffusion:
    """The diffusion model with the noise that serving will draw by default."""
    rows, columns = config.preparation.shape
    f = config.downsampling
    noise = KeyedNoise(config.seed, (config.vqvae.embedding_dim, rows // f, columns // f), view)
    return anomaly.Diffusion(make_schedule(config.schedule), models.denoise, noise)


def examine(scan: Volume | HealthyScan, models: Models, config: Config) -> Examined:
    """Prepare, encode and KL-map a scan in every view, as `detect` does; of pictures, those that are healthy."""
    healthy = scan if isinstance(scan, HealthyScan) else HealthyScan(scan)
    slices = to_slices(healthy.volume, config.training_preparation)
    known = healthy.known(slices, config.training_preparation)
    x, foreground = slices.x[known], slices.foreground[known]
    d = config.detection
    sigma = latent_sigma(d.kl_smoothing_mm, config.preparation, config.downsampling)
    looks = {}
    for index, view in enumerate(d.views):
        seen = see(turn(x, view), turn(foreground, view), known, models, make_diffusion(models, config, index))
        kl = anomaly.kl_map(seen.z0, known, seen.diffusion, d.kl_timesteps, d.kl_mean)
        smoothed = anomaly.smooth_kl(kl, seen.latents, sigma)
        looks[view] = Look(seen, smoothed, models.decode(seen.z0)[:, 0])
    return Examined(foreground, slices.placement, looks)


def imagine_look(look: Look, mask: BoolArray, models: Models, timesteps: tuple[int, ...]) -> FloatArray:
    """The decoded counterpart of one view; D(z0) where the mask of a slice is empty, (K, H, W)."""
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    imagined = look.reconstruction.copy()
    if found.size:
        imagined[found] = imagine(look.seen, mask, found, models, timesteps)
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
        plain = anomaly.residual(reference, counterpart, mask)
        surprise = look.kl / np.float32(kl_threshold)
        return anomaly.weigh(plain, counterpart, surprise, look.seen.latents, d.contrast_floor, by_kl=d.weighted_by_kl)

    looks = [scan.looks[view] for view in d.views]
    residual = mean_view([differs(*each) for each in zip(looks, masks, imagined, strict=True)], d.views)
    judged = anomaly.erode(scan.foreground, d.erosion)
    settled = settle(residual, scan.plain.seen.x, judged, d, config.preparation.spacing_mm)
    return np.where(judged, settled, np.float32(np.nan))
