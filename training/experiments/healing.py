"""The paper's opponent as a method of the tables: codes that are unlikely after those before them are drawn anew."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from app.pipeline import diffusion, residual
from app.volume import FloatArray
from training.config import Config
from training.experiments import transformer
from training.experiments.cases import VALIDATION_CASES, Case
from training.experiments.healed import Healed, drawing, healed_path
from training.experiments.methods import BATCH, DIFFERENCE, OVER_CONTRAST, Maps, Method, compared, network_size
from training.experiments.opponents import load, opponent_of
from training.restore import TorchNetworks

# Slices that a process draws in before it gets others.
DRAWN_AT_ONCE = 4
# For its time.
TIMED_SLICES = 12
# Of its map.
WHOLE, WITHIN = "everywhere", "where codes were drawn anew"


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
                mask = residual.upsample(anew.numpy(), shape)
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
    size = network_size(network) + network_size(networks.encoder) + network_size(networks.decoder)

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
