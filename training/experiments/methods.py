"""Each method as functions from a case to an anomaly map, and what of it is chosen on validation subjects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import ndimage

from app.manifest import Manifest, Range
from app.pipeline import diffusion, residual
from app.pipeline.detect import detect
from app.pipeline.networks import Networks
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, cached_slices
from training.experiments.cases import Case
from training.experiments.opponents import OPPONENTS, build, bundle_folder, load, opponent_of, reconstruct
from training.restore import TorchNetworks, load_networks

# Case -> (K, H, W).
Maps = Callable[[Case], FloatArray]

OURS = "counterpart"
BATCH = 16
# An opponent's difference may be divided by the local contrast of what was reconstructed, as a bundle's is.
CONTRAST_FLOOR = 0.02
DIFFERENCE, OVER_CONTRAST = "difference", "over local contrast"
LARGEST = float(np.finfo(np.float32).max)
EVERYTHING = Range(low=-LARGEST, high=LARGEST)


def gaussian(values: FloatArray, pixels: float) -> FloatArray:
    """A Gaussian within each slice."""
    result: FloatArray = ndimage.gaussian_filter(values, (0, pixels, pixels))
    return result


# What an opponent's map may be smoothed by within each slice, to choose from: what a bundle of ours may have, and more.
AS_IT_IS = "as it is"
FILTERS: dict[str, Callable[[FloatArray], FloatArray]] = {
    AS_IT_IS: lambda values: values,
    **{f"Gaussian of {p:g}": partial(gaussian, pixels=p) for p in (1.0, 2.0)},
    **{f"median of {p}": partial(residual.median_filter, pixels=p) for p in (3, 5)},
}


@dataclass(frozen=True)
class Method:
    """One line of a table.

    Attributes
    ----------
    name, title : str
    variants : dict of str to callable
        Maps to choose from on validation subjects.
    smoothing : tuple of str
        Names of `FILTERS`, to choose from too.
    parameters : int
        Of its networks.
    seconds : callable, optional
        What a slice of some cases takes, where that must be taken apart: a map may be made from what was drawn before.
    """

    name: str
    title: str
    variants: dict[str, Maps]
    smoothing: tuple[str, ...] = tuple(FILTERS)
    parameters: int = 0
    seconds: Callable[[Sequence[Case]], float] | None = None


def absolute(off: FloatArray) -> FloatArray:
    """How far, whichever way."""
    return np.asarray(np.abs(off), dtype=np.float32)


def compared(x: FloatArray, seen: FloatArray) -> dict[str, FloatArray]:
    """|x - seen| of slices (N, H, W), and the same over the local contrast of what is seen."""
    off = absolute(x - seen)
    return {DIFFERENCE: off, OVER_CONTRAST: off / (CONTRAST_FLOOR + residual.local_contrast(seen))}


def reconstructions(seen: Callable[[Case], FloatArray]) -> dict[str, Maps]:
    """Both maps of a method that makes the slices (K, H, W) of a case again."""

    def only(variant: str) -> Maps:
        return lambda case: compared(case.x[:, 0], seen(case))[variant]

    return {variant: only(variant) for variant in (DIFFERENCE, OVER_CONTRAST)}


def ungated(manifest: Manifest) -> Manifest:
    """One that refuses no scan for its looks: the maps are compared, not the gates."""
    gate = manifest.ood
    update = {
        "typical": (EVERYTHING,) * len(gate.median_kl_range),
        "reconstruction": EVERYTHING,
        "max_fraction_out": 1.0,
        "max_slices_out": None,
    }
    return manifest.model_copy(update={"gate": gate.model_copy(update=update)})


def ours(models: Networks, manifest: Manifest) -> Maps:
    """The service's own map, of the whole scan."""
    opened = ungated(manifest)

    def maps(case: Case) -> FloatArray:
        return detect(case.volume, models, opened).anomaly[case.known]

    return maps


def without_model(config: Config) -> dict[str, Method]:
    """Thresholds on intensity, and on the difference from the mean healthy slice."""
    mean = np.asarray(cached_slices(config, "train").mean(axis=0) / UINT16_MAX, dtype=np.float32)

    def from_median(case: Case) -> FloatArray:
        middle = [np.median(x[f]) if f.any() else 0.0 for x, f in zip(case.x[:, 0], case.foreground, strict=True)]
        return absolute(case.x[:, 0] - np.asarray(middle, np.float32)[:, None, None])

    intensity: dict[str, Maps] = {
        "bright": lambda case: case.x[:, 0],
        "dark": lambda case: -case.x[:, 0],
        "far from the median": from_median,
    }
    if config.bundle.sequence == "FLAIR":
        # What is ill is bright there; half of the synthetic lesions are dark, and would choose the wrong way.
        intensity = {"bright": intensity["bright"]}
    return {
        "intensity": Method("intensity", "intensity threshold", intensity),
        "mean": Method(
            "mean",
            "difference from the mean healthy slice",
            reconstructions(lambda c: np.broadcast_to(mean, c.x[:, 0].shape)),
        ),
    }


def reconstructing(name: str, config: Config) -> Callable[[FloatArray], FloatArray]:
    """Slices (N, 1, H, W) as an autoencoder makes them again."""
    network = load(opponent_of(name, config.name), config)

    def run(x: FloatArray) -> FloatArray:
        with torch.inference_mode():
            # A copy: numpy leaves the stride of a single channel open, and torch takes it for channels_last.
            parts = torch.from_numpy(x.copy()).split(BATCH)
            seen: FloatArray = torch.cat([reconstruct(network, part) for part in parts]).numpy()
        return seen

    return run


def autoencoder(name: str, config: Config) -> Method:
    """The difference from what one of the opponents makes of a slice."""
    run = reconstructing(name, config)
    size = network_size(build(name, config))
    return Method(name, OPPONENTS[name].title, reconstructions(lambda c: run(c.x)[:, 0]), parameters=size)


def plain_vqvae(networks: TorchNetworks) -> Method:
    """|x - D(z0)|: the bundle's VQ-VAE without any diffusion."""
    models = networks.models().in_batches(BATCH, lambda _: None)

    size = network_size(networks.encoder) + network_size(networks.decoder)
    seen = reconstructions(lambda case: models.decode(models.encode(case.x))[:, 0])
    return Method("vqvae", "VQ-VAE without diffusion", seen, parameters=size)


def vqvae_networks(config: Config) -> TorchNetworks:
    """The bundle's networks in torch."""
    return load_networks(bundle_folder(config), config)


def network_size(network: torch.nn.Module) -> int:
    """How many numbers it has learnt."""
    return sum(p.numel() for p in network.parameters())
