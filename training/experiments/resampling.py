"""The transformer baseline: unlikely codes are resampled and the slice is compared with the decoded result."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from app.pipeline.scores import upsample
from app.volume import FloatArray
from training.config import Config
from training.experiments import transformer
from training.experiments.baselines import (
    DIFFERENCE,
    OVER_CONTRAST,
    count_parameters,
    difference_maps,
    train_and_load,
)
from training.experiments.cases import VALIDATION_CASES, Case, spread
from training.experiments.methods import ENSEMBLE, TRANSFORMER
from training.experiments.segmentation import BATCH, AnomalyMap, ComparedMethod
from training.networks import TorchNetworks

# Slices that a process resamples together.
CHUNK = 4
# Slices that are resampled to measure the time.
TIMED_SLICES = 12
# Part of a map that is used.
EVERYWHERE, RESAMPLED_ONLY = "everywhere", "resampled codes only"


class CodeResampler:
    """Resampling of codes that are unlikely given the codes before them.

    Parameters
    ----------
    vqvae : TorchNetworks
        The bundle's networks.
    network : DecoderOnlyTransformer
        Network that was trained on the codes.
    seed : int
    parallel_map : callable
        Function like `map` that may use several processes.
    """

    def __init__(
        self,
        vqvae: TorchNetworks,
        network: torch.nn.Module,
        seed: int,
        parallel_map: Callable[..., Iterable[torch.Tensor]] = map,
    ) -> None:
        self.vqvae, self.network, self._seed, self._map = vqvae, network, seed, parallel_map
        self.threshold = -np.inf

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of slices (N, 1, H, W), (N, h, w)."""
        return self.vqvae.code_decoder.nearest(self.vqvae.encoder(x))

    @torch.inference_mode()
    def log_likelihood(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihood of each code (N, h, w)."""
        parts = [transformer.log_likelihood(self.network, part.flatten(1)) for part in codes.split(BATCH)]
        return torch.cat(parts).view_as(codes)

    def calibrate(self, healthy: Sequence[FloatArray]) -> None:
        """Set the threshold from slices (N, 1, H, W) of healthy validation subjects."""
        every = torch.cat([self.log_likelihood(self.encode(torch.from_numpy(x))).flatten() for x in healthy])
        self.threshold = float(np.quantile(every.numpy(), transformer.QUANTILE))

    @torch.inference_mode()
    def resample(self, codes: torch.Tensor, chosen: torch.Tensor, draw: int) -> torch.Tensor:
        """Return slices (N, 1, H, W) from codes of which the chosen ones (N, h, w) are resampled."""
        flat = codes.flatten(1)
        draws = transformer.uniform_draws(flat, self._seed + draw)
        chunks = [part.split(CHUNK) for part in (flat, chosen.flatten(1), draws)]
        resampled = torch.cat(list(self._map(partial(_resample_chunk, self.network), *chunks))).view_as(codes)
        return torch.cat([self.vqvae.code_decoder.decode_codes(part) for part in resampled.split(BATCH)])

    def residuals(self, case: Case, draws: int, *, mirrored: bool) -> dict[str, FloatArray]:
        """Return the difference from the resampled slices, mean over draws and directions, (M, H, W), by variant.

        The variant `RESAMPLED_ONLY` keeps the pixels of resampled codes, as Pinaya et al. do to exclude the
        autoencoder's own error.
        """
        x = torch.from_numpy(np.ascontiguousarray(case.x))
        total: dict[str, FloatArray] = {}
        directions = (False, True) if mirrored else (False,)
        for flip in directions:
            shown = x.flip(-1) if flip else x
            codes = self.encode(shown)
            chosen = self.log_likelihood(codes) < self.threshold
            mask = upsample(chosen.numpy(), (x.shape[2], x.shape[3]))
            for draw in range(draws):
                resampled = self.resample(codes, chosen, draw)
                for kind, difference in difference_maps(shown[:, 0].numpy(), resampled[:, 0].numpy()).items():
                    for where, values in ((EVERYWHERE, difference), (RESAMPLED_ONLY, difference * mask)):
                        unflipped = values[..., ::-1] if flip else values
                        total[f"{kind}, {where}"] = total.get(f"{kind}, {where}", 0) + unflipped
        return {name: np.asarray(v / (draws * len(directions)), dtype=np.float32) for name, v in total.items()}

    def time_per_slice(self, cases: Sequence[Case], draws: int, *, mirrored: bool) -> float:
        """Return the mean seconds of one slice in one process, over one slice each of some cases."""
        alone = CodeResampler(self.vqvae, self.network, self._seed)
        alone.threshold = self.threshold
        some = spread(cases, TIMED_SLICES)
        start = time.perf_counter()
        for i, case in enumerate(some):
            at = round((i + 0.5) / len(some) * (len(case.slice_indices) - 1))
            alone.residuals(replace(case, slice_indices=case.slice_indices[at : at + 1]), draws, mirrored=mirrored)
        return (time.perf_counter() - start) / len(some)


@torch.inference_mode()
def _resample_chunk(
    network: torch.nn.Module, codes: torch.Tensor, chosen: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    return transformer.resample(network, codes, chosen, draws)


def _process_pool() -> ProcessPoolExecutor:
    """Make one single-threaded process for each CPU: a single draw does not fill more than one CPU."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), spawn, initializer=torch.set_num_threads, initargs=(1,))


def transformer_method(
    name: str, config: Config, networks: TorchNetworks, healthy: Sequence[FloatArray]
) -> ComparedMethod:
    """Return the transformer baseline, as one draw or as the ensemble.

    Parameters
    ----------
    healthy : sequence of (N, 1, H, W) ndarray
        Slices of healthy validation subjects, for the threshold.
    """
    network = train_and_load(TRANSFORMER, config)
    resampler = CodeResampler(networks, network, config.seed, _process_pool().map)
    resampler.calibrate(healthy)
    is_ensemble = name == ENSEMBLE
    draws = transformer.DRAWS if is_ensemble else 1
    # All variants come from the same draws.
    residuals = lru_cache(maxsize=VALIDATION_CASES)(partial(resampler.residuals, draws=draws, mirrored=is_ensemble))

    def only(variant: str) -> AnomalyMap:
        return lambda case: residuals(case)[variant]

    variants = [f"{kind}, {where}" for kind in (DIFFERENCE, OVER_CONTRAST) for where in (EVERYWHERE, RESAMPLED_ONLY)]
    return ComparedMethod(
        name,
        {variant: only(variant) for variant in variants},
        parameters=count_parameters(network, networks.encoder, networks.decoder),
        time_per_slice=partial(resampler.time_per_slice, draws=draws, mirrored=is_ensemble),
    )
