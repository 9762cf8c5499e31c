"""Baselines in torch: the paper's algorithm, pixel-space diffusion and the transformer, as functions of slices."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.nets.transformer import DecoderOnlyTransformer

from app.pipeline.diffusion import Schedule, latent_foreground
from app.pipeline.scores import masked_residual
from app.runtime.bundle import read_manifest
from app.volume import BoolArray, FloatArray
from benchmarks import paper
from benchmarks.rows import Row
from benchmarks.trace import count_evaluations
from training.config import Config
from training.experiments import transformer
from training.networks import load_networks

PLANS = {"ddim": paper.DDIM_50, "ancestral": paper.ANCESTRAL}

# x (N, 1, H, W), foreground (N, H, W) -> anomaly map (N, H, W).
Method = Callable[[FloatArray, BoolArray], FloatArray]


class TorchBaselines:
    """Baselines that share the networks of one bundle.

    Parameters
    ----------
    folder : Path
        The bundle.
    config : Config
        Configuration of its training.
    counts : Counter
        Receives the number of slices that each network is evaluated on.

    Attributes
    ----------
    networks : Networks
        Counted networks of the bundle in torch.
    threshold : float
        KL in nats above which the paper's method resamples a latent. With 0, all foreground latents are resampled,
        which costs the same.
    loop_seconds : float
        Seconds in loops over noise levels or ensemble members.
    """

    def __init__(self, folder: Path, config: Config, counts: Counter[str]) -> None:
        self._torch = load_networks(folder, config)
        self.networks = count_evaluations(self._torch.models(), counts)
        self.manifest = read_manifest(folder)
        self._config, self._counts = config, counts
        torch.manual_seed(config.seed)  # initialises the untrained networks
        self._schedule = Schedule.from_settings(self.manifest.schedule)
        self.threshold = 0.0
        self.loop_seconds = 0.0

    def method(self, row: Row, stride: int = 1) -> Method:
        """Return the method of a row, which works batch by batch, with one in `stride` of its noise levels."""
        if row.family in PLANS:
            whole = self._paper_method(PLANS[row.family].thin(stride))
        elif row.family == "pixel":
            whole = self._pixel_method(int(row.name.rpartition("-")[2]), stride)
        else:
            whole = self._transformer_method(row)

        def batched(x: FloatArray, foreground: BoolArray) -> FloatArray:
            starts = range(0, len(x), row.batch)
            return np.concatenate([whole(x[i : i + row.batch], foreground[i : i + row.batch]) for i in starts])

        return batched

    def latent_kl(self, x: FloatArray) -> FloatArray:
        """Return the paper's KL map of some slices in nats, (N, h, w)."""
        with torch.inference_mode():
            z0 = torch.from_numpy(self.networks.encode(x))
            return paper.kl_map(z0, self._process(self._torch.denoiser), paper.KL_TIMES).numpy()

    @contextmanager
    def _timed_loop(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.loop_seconds += time.perf_counter() - start

    def _process(self, denoiser: torch.nn.Module) -> paper.Process:
        """Make a diffusion model with its own seed and a counted denoiser."""

        def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self._counts["denoise"] += len(z)
            epsilon: torch.Tensor = denoiser(z, t)
            return epsilon

        return paper.Process(self._schedule, denoise, torch.Generator().manual_seed(self._config.seed))

    def _paper_method(self, plan: paper.Plan) -> Method:
        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            latents = latent_foreground(foreground, self.manifest.latent.downsampling)
            with torch.inference_mode():
                process = self._process(self._torch.denoiser)
                z0 = torch.from_numpy(self.networks.encode(x))
                with self._timed_loop():
                    mask = (paper.kl_map(z0, process, plan.kl).numpy() > self.threshold) & latents
                    inpainted = paper.inpaint(z0, torch.from_numpy(mask), process, plan).numpy()
            return masked_residual(x[:, 0], self.networks.decode(inpainted)[:, 0], mask)

        return run

    def _pixel_method(self, steps: int, stride: int) -> Method:
        """Make AnoDDPM (Wyatt et al. 2022): diffuse the image and reverse all steps, with the denoiser's U-Net."""
        c = self._config.denoiser
        unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            num_res_blocks=c.residual_blocks,
            channels=c.channels,
            attention_levels=c.attention_levels,
            num_head_channels=c.head_channels,
        ).eval()
        plan = paper.Plan((), tuple(range(steps, 0, -1)), "ancestral").thin(stride)

        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            with torch.inference_mode():
                everywhere = torch.ones((len(x), *x.shape[2:]), dtype=torch.bool)
                with self._timed_loop():
                    counterpart = paper.inpaint(torch.from_numpy(x), everywhere, self._process(unet), plan).numpy()
            return np.asarray(np.abs(x - counterpart)[:, 0] * foreground, dtype=np.float32)

        return run

    def _transformer_method(self, row: Row) -> Method:
        """Make one member of the transformer's ensemble: resample unlikely codes and decode."""
        decoder = self._torch.code_decoder
        _, rows, columns = self.manifest.latent_shape
        size = transformer.PUBLISHED if "published" in row.name else transformer.TRAINED
        network: DecoderOnlyTransformer = transformer.build_transformer(len(decoder.codes), rows * columns, size).eval()
        known_at_once = "known" in row.name
        resample = transformer.resample if known_at_once else transformer.resample_stepwise

        def run(x: FloatArray, foreground: BoolArray) -> FloatArray:
            with torch.inference_mode(), self._timed_loop():
                grid = decoder.nearest(torch.from_numpy(self.networks.encode(x)))  # (N, h, w)
                codes = grid.flatten(1)
                chosen = transformer.least_likely(network, codes)
                resampled = resample(network, codes, chosen, transformer.uniform_draws(codes, self._config.seed))
                # An evaluation is one position: all for the likelihood, then those that are fed to resample.
                fed = transformer.count_fed_positions(chosen) if known_at_once else codes.numel()
                self._counts["denoise"] += codes.numel() + fed
                self._counts["decode"] += len(x)
                counterpart = decoder.decode_codes(resampled.view_as(grid)).numpy()
            return np.asarray(np.abs(x - counterpart)[:, 0] * foreground, dtype=np.float32)

        return run
