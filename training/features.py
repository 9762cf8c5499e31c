"""Latents, KL maps and anomaly maps of healthy scans, computed once for calibration and experiments."""

from dataclasses import dataclass

import numpy as np

from app.manifest import View, latent_sigma
from app.pipeline.diffusion import (
    Diffusion,
    EncodedView,
    KeyedNoise,
    Networks,
    Schedule,
    decode_counterpart,
    encode_view,
    kl_map,
)
from app.pipeline.preprocess import to_slices
from app.pipeline.scores import (
    augment,
    average_views,
    erode_foreground,
    masked_residual,
    postprocess_residual,
    smooth_kl,
    weight_residual,
)
from app.runtime.session import as_callable, open_session
from app.volume import BoolArray, FloatArray, IntArray
from training.config import Config
from training.data import HealthyScan
from training.export import denoiser_graph, graphs_folder

BATCH = 16


@dataclass(frozen=True, eq=False)
class ViewFeatures:
    """One view of a scan, up to its KL map.

    Attributes
    ----------
    encoded : EncodedView
        Slices and latents.
    kl : (M, h, w) ndarray
        Smoothed KL map, in nats.
    reconstruction : (M, H, W) ndarray
        D(z0).
    """

    encoded: EncodedView
    kl: FloatArray
    reconstruction: FloatArray


@dataclass(frozen=True, eq=False)
class ScanFeatures:
    """Usable slices of one scan, in each view.

    Attributes
    ----------
    foreground : (M, H, W) ndarray of bool
    views : dict of View to ViewFeatures
        The identity view first.
    """

    foreground: BoolArray
    views: dict[View, ViewFeatures]

    @property
    def identity(self) -> ViewFeatures:
        """The identity view."""
        return self.views[View()]

    @property
    def foreground_kl(self) -> FloatArray:
        """KL of the foreground latents of the identity view, one-dimensional, in nats."""
        return self.identity.kl[self.identity.encoded.foreground_latents]


def load_exported_networks(config: Config) -> Networks:
    """Open the exported graphs as a CPU serves them, with the denoiser in int8 if there is one."""
    folder = graphs_folder(config)
    paths = (folder / "encoder.onnx", denoiser_graph(config), folder / "decoder.onnx")
    encode, denoise, decode = (as_callable(open_session(path, "cpu")) for path in paths)
    return Networks(encode, denoise, decode).in_batches(BATCH, lambda _: None)


def extract_features(scan: HealthyScan, networks: Networks, config: Config) -> ScanFeatures:
    """Preprocess and encode the usable slices of a scan and compute their KL map in every view, as `detect` does."""
    slices = to_slices(scan.volume, config.training_preprocessing)
    usable = scan.usable_slices(slices, config.training_preprocessing)
    return features_of_slices(slices.x[usable], slices.foreground[usable], usable, networks, config)


def features_of_slices(
    x: FloatArray, foreground: BoolArray, slice_indices: IntArray, networks: Networks, config: Config
) -> ScanFeatures:
    """Encode slices and compute their KL map in every view.

    Parameters
    ----------
    x : (M, 1, H, W) ndarray
    foreground : (M, H, W) ndarray of bool
    slice_indices : (M,) ndarray of int
        Indices in the stack of the scan: keys of the noise.
    networks : Networks
    config : Config
    """
    d = config.detection
    sigma = latent_sigma(d.kl_smoothing_mm, config.preprocessing, config.downsampling)
    views = {}
    for index, view in enumerate(d.views):
        noise = KeyedNoise(config.seed, config.latent_shape, index)
        diffusion = Diffusion(Schedule.from_settings(config.schedule), networks.denoise, noise)
        encoded = encode_view(augment(x, view), augment(foreground, view), slice_indices, networks, diffusion)
        kl = kl_map(encoded.z0, slice_indices, diffusion, d.kl_timesteps, d.kl_mean)
        smoothed = smooth_kl(kl, encoded.foreground_latents, sigma)
        views[view] = ViewFeatures(encoded, smoothed, networks.decode(encoded.z0)[:, 0])
    return ScanFeatures(foreground, views)


def decode_view(view: ViewFeatures, mask: BoolArray, networks: Networks, timesteps: tuple[int, ...]) -> FloatArray:
    """Return the decoded counterpart of one view, (M, H, W). A slice with an empty mask has D(z0)."""
    masked = np.flatnonzero(mask.any(axis=(1, 2)))
    counterpart = view.reconstruction.copy()
    if masked.size:
        counterpart[masked] = decode_counterpart(view.encoded, mask, masked, networks, timesteps)
    return counterpart


def anomaly_map(
    scan: ScanFeatures, masks: list[BoolArray], counterparts: list[FloatArray], config: Config
) -> FloatArray:
    """Return the anomaly map as `detect` computes it, (M, H, W), with NaN outside the valid mask.

    Parameters
    ----------
    scan : ScanFeatures
    masks, counterparts : list of ndarray
        Latent mask and decoded counterpart of each view, in the order of the configuration.
    config : Config
    """
    d = config.detection

    def weighted(view: ViewFeatures, mask: BoolArray, counterpart: FloatArray) -> FloatArray:
        plain = masked_residual(view.encoded.x[:, 0], counterpart, mask)
        return weight_residual(plain, counterpart, d.contrast_floor)

    views = [scan.views[view] for view in d.views]
    mean = average_views([weighted(*each) for each in zip(views, masks, counterparts, strict=True)], d.views)
    valid = erode_foreground(scan.foreground, d.erosion)
    processed = postprocess_residual(mean, scan.identity.encoded.x, valid, d, config.preprocessing.spacing_mm)
    return np.where(valid, processed, np.float32(np.nan))
