"""A row's method as one function of slices; every evaluation of a network is counted."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.nets.transformer import DecoderOnlyTransformer
from torch.utils.flop_counter import FlopCounterMode

from app.pipeline import anomaly
from app.pipeline.prepare import BoolArray
from app.pipeline.schedule import Schedule
from app.runtime.bundle import read_manifest
from app.volume import FloatArray
from benchmarks import paper
from benchmarks.counted import counting
from benchmarks.rows import OWN, ROWS, TRANSFORMER, Row, kind_of
from training.config import Config
from training.experiments import transformer
from training.restore import TorchNetworks, load_networks

PLANS = {"ddim": paper.DDIM_50, "ancestral": paper.ANCESTRAL}
# Of the paper's mask: a latent above this percentile of healthy validation latents is free to change.
PERCENTILE = 97.5

OWN_ROW = next(row for row in ROWS if row.name == OWN)

# x (N, 1, H, W), foreground (N, H, W) -> anomaly map (N, H, W).
Method = Callable[[FloatArray, BoolArray], FloatArray]


class Peers:
    """The torch methods on one bundle's networks.

    Parameters
    ----------
    folder : Path
        The bundle.
    config : Config
        That it was trained by.
    counts : Counter
        Of evaluations.
    """

    def __init__(self, folder: Path, config: Config, counts: Counter[str]) -> None:
        self.networks: TorchNetworks = load_networks(folder, config)
        self.manifest = read_manifest(folder)
        self.models = counting(self.networks.models(), counts)
        self._config, self._counts = config, counts
        torch.manual_seed(config.seed)  # of untrained weights
        s = self.manifest.schedule
        self._schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
        self.threshold = 0.0
        self.loop_seconds = 0.0

    @contextmanager
    def looping(self) -> Iterator[None]:
        """What happens inside is the loop over noise levels."""
        start = time.perf_counter()
        yield
        self.loop_seconds += time.perf_counter() - start

    def process(self, denoiser: torch.nn.Module) -> paper.Process:
        """A diffusion model with its own seed, whose evaluations are counted."""

        def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self._counts["denoise"] += len(z)
            epsilon: torch.Tensor = denoiser(z, t)
            return epsilon

        return paper.Process(self._schedule, denoise, torch.Generator().manual_seed(self._config.seed))

    def latent_kl(self, x: FloatArray) -> FloatArray:
        """The paper's KL map of some slices, (N, h, w)."""
        with torch.inference_mode():
            z0 = torch.from_numpy(self.models.encode(x))
            return paper.kl_map(z0, self.process(self.networks.denoiser), paper.KL_TIMES).numpy()

    def paper_method(self, plan: paper.Plan) -> Method:
        """The paper's algorithm; with a threshold of 0, every foreground latent is free, which costs the same."""

        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            latents = anomaly.latent_foreground(foreground, self.manifest.latent.downsampling)
            with torch.inference_mode():
                process = self.process(self.networks.denoiser)
                z0 = torch.from_numpy(self.models.encode(x))
                with self.looping():
                    mask = (paper.kl_map(z0, process, plan.kl).numpy() > self.threshold) & latents
                    imagined = paper.inpaint(z0, torch.from_numpy(mask), process, plan).numpy()
            return anomaly.residual(x[:, 0], self.models.decode(imagined)[:, 0], mask)

        return run

    def pixel_unet(self) -> torch.nn.Module:
        """The denoiser's own shape, on one channel of pixels."""
        c = self._config.denoiser
        unet: torch.nn.Module = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            num_res_blocks=c.residual_blocks,
            channels=c.channels,
            attention_levels=c.attention,
            num_head_channels=c.head_channels,
        )
        return unet.eval()

    def pixel_method(self, steps: int, every: int) -> Method:
        """AnoDDPM (Wyatt et al. 2022): diffuse the image so far, and come all the way back."""
        unet = self.pixel_unet()
        plan = paper.Plan((), tuple(range(steps, 0, -1)), "ancestral").thinned(every)

        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            with torch.inference_mode():
                image = torch.from_numpy(x)
                everywhere = torch.ones((len(x), *x.shape[2:]), dtype=torch.bool)
                with self.looping():
                    imagined = paper.inpaint(image, everywhere, self.process(unet), plan).numpy()
            return np.asarray(np.abs(x - imagined)[:, 0] * foreground, dtype=np.float32)

        return run

    def transformer(self, row: Row) -> DecoderOnlyTransformer:
        """Of the row's size, untrained."""
        _, rows, columns = self.manifest.latent_shape
        size = transformer.PUBLISHED if "published" in row.name else transformer.TRAINED
        return transformer.build_transformer(len(self.networks.decoder.codes), rows * columns, size).eval()

    def transformer_method(self, row: Row) -> Method:
        """Codes that are unlikely, drawn anew; then decoded: one member of its ensemble."""
        network, known = self.transformer(row), "known" in row.name
        heal = transformer.resample if known else transformer.resample_stepwise

        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            with torch.inference_mode(), self.looping():
                grid = self.networks.decoder.nearest(torch.from_numpy(self.models.encode(x)))  # (N, h, w)
                found = grid.flatten(1)
                anew = transformer.least_likely(network, found)
                healed = heal(network, found, anew, transformer.uniform_draws(found, self._config.seed))
                # Of the likelihood, then of the healing.
                self._counts["denoise"] += found.numel()
                self._counts["denoise"] += transformer.count_fed_positions(anew) if known else found.numel()
                self._counts["decode"] += len(x)
                imagined = self.networks.decoder.decode_codes(healed.view_as(grid)).numpy()
            return np.asarray(np.abs(x - imagined)[:, 0] * foreground, dtype=np.float32)

        return run

    def method(self, row: Row, every: int = 1) -> Method:
        """What a row runs, a batch at a time, with one in `every` of its noise levels."""
        kind, variant = kind_of(row), row.name.rpartition("-")[2]
        if kind in PLANS:
            whole = self.paper_method(PLANS[kind].thinned(every))
        elif kind == "pixel":
            whole = self.pixel_method(int(variant), every)
        else:
            whole = self.transformer_method(row)

        def batched(x: FloatArray, foreground: BoolArray) -> FloatArray:
            starts = range(0, len(x), row.batch)
            return np.concatenate([whole(x[i : i + row.batch], foreground[i : i + row.batch]) for i in starts])

        return batched

    def gigaflops(self, row: Row) -> dict[str, float]:
        """Of one evaluation of each network on one slice: two for a multiply and an add."""
        height, width = self.manifest.preparation.shape
        x, z = torch.zeros(1, 1, height, width), torch.zeros(1, *self.manifest.latent_shape)
        t = torch.zeros(1, dtype=torch.int64)
        asked: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = {
            "encode": (self.networks.encoder, (x,)),
            "denoise": (self.networks.denoiser, (z, t)),
            "decode": (self.networks.decoder, (z,)),
        }
        if row.name.startswith("pixel"):
            asked["denoise"] = (self.pixel_unet(), (x, t))
        if kind_of(row) == TRANSFORMER:
            network = self.transformer(row)
            length = network.max_seq_len
            asked["denoise"] = (network, (torch.zeros(1, length, dtype=torch.int64),))
        counted = {name: _gigaflops(network, inputs) for name, (network, inputs) in asked.items()}
        if kind_of(row) == TRANSFORMER:
            counted["denoise"] /= length  # an evaluation is one position
        return counted


def network_gigaflops(folder: Path, config: Config) -> dict[str, float]:
    """Of one evaluation of each of a bundle's networks on one slice."""
    return Peers(folder, config, Counter()).gigaflops(OWN_ROW)


def _gigaflops(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return float(counter.get_total_flops()) / 1e9
