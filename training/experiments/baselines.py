"""Baselines that are trained on the same healthy slices, and the anomaly maps of all but the transformer.

`python -m training.experiments.baselines CONFIG [NAME ...]` trains them or continues a training. The autoencoders
follow Baur et al. 2021 (arXiv 2004.03271), the transformer Pinaya et al. 2021 (arXiv 2102.11650). Networks are MONAI's.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets.autoencoder import AutoEncoder
from monai.networks.nets.varautoencoder import VarAutoEncoder
from torch import nn
from torch.nn import functional as F

from app.pipeline.scores import local_contrast
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, HealthySlices, UInt16Array, cached_slices, data_hash, load_split
from training.experiments.cases import Case
from training.experiments.methods import BUDGETS, TRANSFORMER, Budget, budget_of
from training.experiments.segmentation import BATCH, AnomalyMap, ComparedMethod
from training.experiments.transformer import build_transformer, shift_right
from training.loop import Batches, Run, TrainingOptions, device, has_fast_bfloat16
from training.networks import TorchNetworks, load_networks

VALIDATION_SLICES = 256
# Channels of an autoencoder's levels, each at half the resolution, and size of its bottleneck.
CHANNELS = (32, 64, 128)
DENSE, SPATIAL = 128, 16
# Added to the local contrast that a difference is divided by.
CONTRAST_FLOOR = 0.02
DIFFERENCE, OVER_CONTRAST = "difference", "over local contrast"

Loss = Callable[[torch.Tensor], torch.Tensor]
# Slices (N, 1, H, W) -> codes of the bundle's VQ-VAE (N, L).
Codes = Callable[[torch.Tensor], torch.Tensor]
# Slices (N, 1, H, W) -> the same slices, reconstructed.
Reconstruct = Callable[[FloatArray], FloatArray]


def build(name: str, config: Config) -> nn.Module:
    """Build the untrained network of a baseline."""
    if name == "spatial-ae":
        spatial: nn.Module = AutoEncoder(2, 1, 1, (*CHANNELS, SPATIAL), (2,) * len(CHANNELS) + (1,), norm="BATCH")
        return spatial
    if name == TRANSFORMER:
        rows, columns = (side // config.downsampling for side in config.preprocessing.shape)
        transformer: nn.Module = build_transformer(config.vqvae_settings.codes, rows * columns)
        return transformer
    shape = (1, *config.preprocessing.shape)
    dense: nn.Module = VarAutoEncoder(2, shape, 1, DENSE, CHANNELS, (2,) * len(CHANNELS), norm="BATCH")
    return dense


def reconstruct(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Reconstruct slices (N, 1, H, W) with an autoencoder."""
    if isinstance(network, VarAutoEncoder):
        reconstructed: torch.Tensor = network.decode_forward(network.encode_forward(x)[0])
    else:
        reconstructed = network(x)
    return reconstructed


def loss_of(name: str, network: nn.Module, codes: Codes | None) -> Loss:
    """Return the loss of a baseline over a batch of slices (N, 1, H, W). Only the transformer needs `codes`."""

    def variational(x: torch.Tensor) -> torch.Tensor:
        reconstructed, mean, log_variance, _ = network(x)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss: torch.Tensor = (F.l1_loss(reconstructed, x, reduction="sum") / len(x) + kl) / x[0].numel()
        return loss

    def next_code(x: torch.Tensor) -> torch.Tensor:
        assert codes is not None, "the transformer is trained on codes"
        target = codes(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=has_fast_bfloat16(x.device)):
            logits = network(shift_right(network, target))
        loss: torch.Tensor = F.cross_entropy(logits.float().transpose(1, 2), target)
        return loss

    if name == "vae":
        return variational
    return next_code if name == TRANSFORMER else lambda x: F.l1_loss(reconstruct(network, x), x)


def slice_codes(config: Config) -> Codes:
    """Return the bundle's VQ-VAE as a function from slices to codes."""
    networks = load_networks(config.bundle_folder, config)

    @torch.no_grad()
    def codes(x: torch.Tensor) -> torch.Tensor:
        nearest: torch.Tensor = networks.code_decoder.nearest(networks.encoder(x)).flatten(1)
        return nearest

    return codes


@torch.no_grad()
def _validate(network: nn.Module, loss: Loss, stack: UInt16Array, batch: int) -> dict[str, float]:
    network.eval()
    some = stack[:: max(1, len(stack) // VALIDATION_SLICES)]
    x = torch.from_numpy(some.astype("float32") / UINT16_MAX)[:, None].to(device())
    mean = sum(float(loss(part)) * len(part) for part in x.split(batch)) / len(x)
    network.train()
    return {"val_loss": mean}


def make_run(budget: Budget, config: Config, network: nn.Module, data: str) -> Run:
    """Make the training run of a baseline. Its checkpoint belongs to the data, the configuration and the budget."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=budget.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / budget.steps, 1))) + 1e-3
    )
    belongs_to = data + repr(sorted(asdict(budget).items()))
    return Run(
        f"baseline-{budget.name}-{budget.steps}x{budget.batch}",
        config,
        belongs_to,
        {"network": network},
        optimiser,
        schedule,
    )


def train(budget: Budget, config: Config, healthy: HealthySlices | None = None) -> None:
    """Train a baseline of a bundle, or continue its training.

    Parameters
    ----------
    healthy : HealthySlices, optional
        Slices. By default those of the configuration.
    """
    healthy = healthy or HealthySlices.of(config)
    torch.manual_seed(config.seed)
    network = build(budget.name, config).to(device()).train()
    loss = loss_of(budget.name, network, slice_codes(config) if budget.name == TRANSFORMER else None)
    batches = Batches(healthy.train, budget.batch, config.seed, config.augmentation)
    run = make_run(budget, config, network, healthy.data)

    def step_fn(_: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        value = loss(x)
        run.optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        run.optimiser.step()
        run.schedule.step()
        return {"loss": value.detach()}

    started = time.monotonic()

    def validate() -> dict[str, float]:
        return _validate(network, loss, healthy.validation, budget.batch) | {"seconds": time.monotonic() - started}

    run.train(batches, TrainingOptions().progress(budget.steps), step_fn, validate, max(1, budget.steps // 10))


def load(budget: Budget, config: Config) -> nn.Module:
    """Load a trained baseline.

    Raises
    ------
    SystemExit
        Its training is missing or not finished.
    """
    network = build(budget.name, config).to(device())
    step = make_run(budget, config, network, data_hash(config, load_split(config.data.splits).train)).resume()
    if step < budget.steps:
        raise SystemExit(
            f"{budget.name} of {config.name} was trained for {step} of {budget.steps} steps. "
            f"Run python -m training.experiments.baselines training/configs/{config.name}.toml {budget.name}."
        )
    return network.eval().requires_grad_(requires_grad=False)


def train_and_load(name: str, config: Config) -> nn.Module:
    """Return a trained baseline, trained now if it was not before."""
    budget = budget_of(name, config.name)
    train(budget, config)
    return load(budget, config)


def count_parameters(*networks: nn.Module) -> int:
    """Return the number of parameters of some networks."""
    return sum(p.numel() for network in networks for p in network.parameters())


def difference_maps(x: FloatArray, reference: FloatArray) -> dict[str, FloatArray]:
    """Return |x - reference| of slices (N, H, W), and the same divided by the reference's local contrast."""
    difference = np.asarray(np.abs(x - reference), dtype=np.float32)
    return {
        DIFFERENCE: difference,
        OVER_CONTRAST: difference / (CONTRAST_FLOOR + local_contrast(reference)),
    }


def reconstruction_maps(reconstruct: Reconstruct) -> dict[str, AnomalyMap]:
    """Return both maps of a method that reconstructs slices."""

    def only(variant: str) -> AnomalyMap:
        return lambda case: difference_maps(case.x[:, 0], reconstruct(case.x)[:, 0])[variant]

    return {variant: only(variant) for variant in (DIFFERENCE, OVER_CONTRAST)}


def intensity_threshold(config: Config) -> ComparedMethod:
    """Return the threshold on a slice's own intensity."""

    def from_median(case: Case) -> FloatArray:
        middle = [np.median(x[f]) if f.any() else 0.0 for x, f in zip(case.x[:, 0], case.foreground, strict=True)]
        return np.asarray(np.abs(case.x[:, 0] - np.asarray(middle, np.float32)[:, None, None]), dtype=np.float32)

    variants: dict[str, AnomalyMap] = {
        "bright": lambda case: case.x[:, 0],
        "dark": lambda case: 1 - case.x[:, 0],
        "far from the median": from_median,
    }
    if config.bundle.sequence == "FLAIR":
        # Lesions are bright on FLAIR. Half of the synthetic lesions are dark and would choose the wrong variant.
        variants = {"bright": variants["bright"]}
    return ComparedMethod("intensity", variants)


def mean_difference(config: Config) -> ComparedMethod:
    """Return the difference from the mean healthy training slice."""
    mean = np.asarray(cached_slices(config, "train").mean(axis=0) / UINT16_MAX, dtype=np.float32)
    return ComparedMethod("mean", reconstruction_maps(lambda x: np.broadcast_to(mean, x.shape)))


def vqvae_reconstructor(networks: TorchNetworks) -> Reconstruct:
    """Return the bundle's VQ-VAE as a function on slices, D(z0), without diffusion."""
    models = networks.models().in_batches(BATCH, lambda _: None)
    return lambda x: models.decode(models.encode(x))


def vqvae_difference(networks: TorchNetworks) -> ComparedMethod:
    """Return |x - D(z0)| of the bundle's VQ-VAE, without diffusion."""
    parameters = count_parameters(networks.encoder, networks.decoder)
    return ComparedMethod("vqvae", reconstruction_maps(vqvae_reconstructor(networks)), parameters=parameters)


def reconstructor(network: nn.Module) -> Reconstruct:
    """Return a trained autoencoder as a function on slices."""

    def run(x: FloatArray) -> FloatArray:
        with torch.inference_mode():
            # Copied, because numpy leaves the stride of a single channel open and torch takes it for channels_last.
            parts = torch.from_numpy(x.copy()).split(BATCH)
            reconstructed: FloatArray = torch.cat([reconstruct(network, part) for part in parts]).numpy()
        return reconstructed

    return run


def autoencoder_difference(name: str, network: nn.Module) -> ComparedMethod:
    """Return the difference from the reconstruction of a trained autoencoder."""
    return ComparedMethod(name, reconstruction_maps(reconstructor(network)), parameters=count_parameters(network))


if __name__ == "__main__":
    _config = Config.load(Path(sys.argv[1]))
    for _name in sys.argv[2:] or BUDGETS:
        train(budget_of(_name, _config.name), _config)
