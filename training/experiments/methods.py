"""Each method as functions from a case to an anomaly map, and what of it is chosen on validation subjects."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from scipy import ndimage

from app.manifest import Manifest, Range
from app.pipeline import anomaly
from app.pipeline.detect import detect
from app.pipeline.models import Models
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, cached_slices
from training.experiments import transformer
from training.experiments.cases import VALIDATION_CASES, Case
from training.experiments.healed import Healed, drawing, healed_path
from training.experiments.opponents import OPPONENTS, build, bundle_folder, load, opponent_of, reconstruct
from training.restore import TorchNetworks, load_networks

# Case -> (K, H, W).
Maps = Callable[[Case], FloatArray]

OURS = "counterpart"
BATCH = 16
# Slices that a process draws in before it gets others.
DRAWN_AT_ONCE = 4
# An opponent's difference may be divided by the local contrast of what was reconstructed, as a bundle's is.
CONTRAST_FLOOR = 0.02
DIFFERENCE, OVER_CONTRAST = "difference", "over local contrast"
LARGEST = float(np.finfo(np.float32).max)
# Of a transformer, for its time.
TIMED_SLICES = 12
# Of the transformer's map.
WHOLE, WITHIN = "everywhere", "where codes were drawn anew"
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
    **{f"median of {p}": partial(anomaly.median, pixels=p) for p in (3, 5)},
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
    return {DIFFERENCE: off, OVER_CONTRAST: off / (CONTRAST_FLOOR + anomaly.local_contrast(seen))}


def reconstructions(seen: Callable[[Case], FloatArray]) -> dict[str, Maps]:
    """Both maps of a method that makes the slices (K, H, W) of a case again."""

    def only(variant: str) -> Maps:
        return lambda case: compared(case.x[:, 0], seen(case))[variant]

    return {variant: only(variant) for variant in (DIFFERENCE, OVER_CONTRAST)}


def ungated(manifest: Manifest) -> Manifest:
    """One that refuses no scan for its looks: the maps are compared, not the gates."""
    gate = manifest.gate
    update = {"typical": (EVERYTHING,) * len(gate.typical), "reconstruction": EVERYTHING, "max_fraction_out": 1.0}
    return manifest.model_copy(update={"gate": gate.model_copy(update=update)})


def ours(models: Models, manifest: Manifest) -> Maps:
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
    size = _size(build(name, config))
    return Method(name, OPPONENTS[name].title, reconstructions(lambda c: run(c.x)[:, 0]), parameters=size)


def plain_vqvae(networks: TorchNetworks) -> Method:
    """|x - D(z0)|: the bundle's VQ-VAE without any diffusion."""
    models = networks.models().in_batches(BATCH, lambda _: None)

    size = _size(networks.encoder) + _size(networks.decoder)
    seen = reconstructions(lambda case: models.decode(models.encode(case.x))[:, 0])
    return Method("vqvae", "VQ-VAE without diffusion", seen, parameters=size)


class Transformer:
    """Codes that are unlikely after those before them, drawn anew.

    Parameters
    ----------
    networks : TorchNetworks
        The bundle's VQ-VAE.
    network : DecoderOnlyTransformer
        Trained on its codes.
    seed : int
    known : Healed, optional
        What was drawn before.
    over : callable
        As `map`: what draws in some slices after the other, or side by side.
    """

    def __init__(
        self,
        networks: TorchNetworks,
        network: torch.nn.Module,
        seed: int,
        known: Healed | None = None,
        over: Callable[..., Iterable[tuple[torch.Tensor, torch.Tensor]]] = map,
    ) -> None:
        self.vqvae, self.network, self._seed, self.known, self._over = networks, network, seed, known or Healed(), over
        self.threshold = -np.inf

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of slices (N, 1, H, W), (N, h, w)."""
        return self.vqvae.decoder.nearest(self.vqvae.encoder(x))

    @torch.inference_mode()
    def likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """log p of each code after those before it, (N, h, w)."""
        codes = self.codes(x)
        return torch.cat(
            [transformer.log_likelihood(self.network, part.flatten(1)) for part in codes.split(BATCH)]
        ).view_as(codes)

    def calibrate(self, healthy: list[FloatArray]) -> None:
        """The threshold, from slices (N, 1, H, W) of healthy validation subjects."""
        every = torch.cat([self.likelihood(torch.from_numpy(x)).flatten() for x in healthy])
        self.threshold = float(np.quantile(every.numpy(), transformer.QUANTILE))

    @torch.inference_mode()
    def _healed(self, x: torch.Tensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices from codes of which the unlikely ones are drawn anew, and which ones were, (N, h, w)."""
        codes = self.codes(x)
        flat, seed = codes.flatten(1), self._seed + draw
        name, first = (drawing(self.network, self.threshold, s) for s in (seed, self._seed))
        lacking = self.known.lacking(flat, name)
        if len(lacking):
            by = transformer.uniforms(flat, seed)[lacking]
            parts = [flat[lacking].split(DRAWN_AT_ONCE), by.split(DRAWN_AT_ONCE)]
            if draw and not len(self.known.lacking(flat, first)):  # what is unlikely is so in every draw
                parts.append(self.known.find(flat, first)[1][lacking].split(DRAWN_AT_ONCE))
            found = zip(*self._over(partial(drawn_in, self.network, self.threshold), *parts), strict=True)
            every, where = (torch.cat(part) for part in found)
            self.known.add(flat, lacking, name, (every, where))
        healed, anew = (part.view_as(codes) for part in self.known.find(flat, name))
        return torch.cat([self.vqvae.decoder.decode_codes(part) for part in healed.split(BATCH)]), anew

    def seconds(self, cases: Sequence[Case], draws: int, *, mirrored: bool) -> float:
        """Of one slice, drawn here and now: the mean over some, one of a case, evenly spread over the cases."""
        anew = Transformer(self.vqvae, self.network, self._seed)
        anew.threshold = self.threshold
        some = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, TIMED_SLICES).round().astype(int))]
        start = time.perf_counter()
        for i, case in enumerate(some):
            place = round((i + 0.5) / len(some) * (len(case.known) - 1))
            anew.residuals(replace(case, known=case.known[place : place + 1]), draws, mirrored=mirrored)
        return (time.perf_counter() - start) / len(some)

    def residuals(self, case: Case, draws: int, *, mirrored: bool) -> dict[str, FloatArray]:
        """What differs from the healed slices, mean over draws and directions, (K, H, W).

        Everywhere, and within the mask of the codes that were drawn anew, up-sampled: Pinaya et al. keep the
        autoencoder's own error out with it.
        """
        x = torch.from_numpy(np.ascontiguousarray(case.x))
        shape = (x.shape[2], x.shape[3])
        total: dict[str, FloatArray] = {}
        ways = (False, True) if mirrored else (False,)
        for flip in ways:
            for draw in range(draws):
                seen = x.flip(-1) if flip else x
                healed, anew = self._healed(seen, draw)
                mask = anomaly.upsample(anew.numpy(), shape)
                for kind, off in compared(seen[:, 0].numpy(), healed[:, 0].numpy()).items():
                    for where, values in ((WHOLE, off), (WITHIN, off * mask)):
                        back = values[..., ::-1] if flip else values
                        total[f"{kind}, {where}"] = total.get(f"{kind}, {where}", 0) + back
        return {name: np.asarray(v / (draws * len(ways)), dtype=np.float32) for name, v in total.items()}


@torch.inference_mode()
def drawn_in(
    network: torch.nn.Module,
    threshold: float,
    codes: torch.Tensor,
    by: torch.Tensor,
    anew: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`heal_unlikely` of a few slices, in whichever process; where it is known what is unlikely, without asking."""
    if anew is not None:
        return transformer.heal_known(network, codes, anew, by), anew
    return transformer.heal_unlikely(network, codes, threshold, by, len(codes))


def _processes() -> ProcessPoolExecutor:
    """One for each processor: between two draws is little to do for more than one of them."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,))


def transformers(config: Config, networks: TorchNetworks, healthy: list[FloatArray]) -> dict[str, Method]:
    """The paper's opponent, alone and as an ensemble."""
    network = load(opponent_of("transformer", config.name), config)
    made = Transformer(networks, network, config.seed, Healed.load(healed_path(config)), _processes().map)
    made.calibrate(healthy)
    size = _size(network) + _size(networks.encoder) + _size(networks.decoder)

    def method(name: str, title: str, draws: int, *, mirrored: bool) -> Method:
        # Both maps come from the same draws: of a case that is asked for both, one pass is enough.
        seen = lru_cache(maxsize=VALIDATION_CASES)(partial(made.residuals, draws=draws, mirrored=mirrored))

        def only(variant: str) -> Maps:
            return lambda case: seen(case)[variant]

        variants = [f"{kind}, {where}" for kind in (DIFFERENCE, OVER_CONTRAST) for where in (WHOLE, WITHIN)]
        maps = {variant: only(variant) for variant in variants}
        return Method(name, title, maps, parameters=size, seconds=partial(made.seconds, draws=draws, mirrored=mirrored))

    ensemble = f"the same, ensemble of {transformer.MEMBERS}"
    return {
        "transformer": method("transformer", "autoregressive transformer", 1, mirrored=False),
        "transformer-ensemble": method("transformer-ensemble", ensemble, transformer.DRAWS, mirrored=True),
    }


def vqvae_networks(config: Config) -> TorchNetworks:
    """The bundle's networks in torch."""
    return load_networks(bundle_folder(config), config)


def _size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
