"""METHOD's opponents, learnt from the same healthy slices.

`python -m training.experiments.opponents CONFIG [NAME ...]` trains them, or goes on.

The autoencoders squeeze a slice until a lesion no longer fits through (Baur et al. 2021, arXiv 2004.03271); the
transformer knows which code follows which (Pinaya et al. 2021, arXiv 2102.11650). Networks are MONAI's.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from monai.networks.nets.autoencoder import AutoEncoder
from monai.networks.nets.varautoencoder import VarAutoEncoder
from torch import nn
from torch.nn import functional as F

from training.config import ROOT, Config
from training.data import UINT16_MAX, Batches, HealthySlices, UInt16Array, data_hash
from training.experiments.transformer import build_transformer, shifted
from training.latents import latent_size
from training.loop import Limits, Run, device, multiplies_bfloat16
from training.restore import load_networks
from training.splits import load_split

VALIDATION_SLICES = 256
# An autoencoder's own: channels of its levels, each half as fine, and what it squeezes a slice into.
CHANNELS = (32, 64, 128)
DENSE, SPATIAL = 128, 16

Loss = Callable[[torch.Tensor], torch.Tensor]
# Slices (N, 1, H, W) -> the VQ-VAE's codes (N, L).
Codes = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Opponent:
    """One network and what it is given to learn.

    Attributes
    ----------
    name, title : str
    steps, batch : int
        Its budget: slices seen are their product.
    learning_rate : float
        At the start of a cosine.
    """

    name: str
    title: str
    steps: int
    batch: int
    learning_rate: float


OPPONENTS = {
    o.name: o
    for o in (
        Opponent("dense-ae", "dense autoencoder", 1500, 32, 1e-3),
        Opponent("spatial-ae", "spatial autoencoder", 1500, 32, 1e-3),
        Opponent("vae", "variational autoencoder", 1500, 32, 1e-3),
        Opponent("transformer", "autoregressive transformer on the codes", 1500, 32, 1e-3),
    )
}


# As many steps of fewer slices, by opponent and bundle. The transformer of `t1` learns on a CPU, where 1,500 batches of
# 32 slices of 1,920 codes take four hours of two cores; that of `flair`, as long, was learnt on a GPU (decision 20).
SMALLER_BATCHES = {("transformer", "t1"): 8}


def opponent_of(name: str, bundle: str) -> Opponent:
    """An opponent with the budget that it has against a bundle."""
    usual = OPPONENTS[name]
    return replace(usual, batch=SMALLER_BATCHES.get((name, bundle), usual.batch))


def slices_seen(opponent: Opponent) -> str:
    """Of its whole training, in words."""
    return f"{opponent.steps * opponent.batch:,}"


def budget(method: str, bundle: str) -> str:
    """What a method of the tables learnt from, in words; nothing where it did not learn here."""
    name = method.removesuffix("-ensemble")
    if name not in OPPONENTS:
        return ""
    opponent = opponent_of(name, bundle)
    return f"{opponent.steps} x {opponent.batch} slices"


def build(name: str, config: Config) -> nn.Module:
    """An opponent's network, untrained."""
    if name == "spatial-ae":
        spatial: nn.Module = AutoEncoder(2, 1, 1, (*CHANNELS, SPATIAL), (2,) * len(CHANNELS) + (1,), norm="BATCH")
        return spatial
    if name == "transformer":
        rows, columns = latent_size(config)
        transformer: nn.Module = build_transformer(config.vqvae.codes, rows * columns)
        return transformer
    shape = (1, *config.preprocessing.shape)
    dense: nn.Module = VarAutoEncoder(2, shape, 1, DENSE, CHANNELS, (2,) * len(CHANNELS), norm="BATCH")
    return dense


def reconstruct(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of slices, (N, 1, H, W)."""
    if isinstance(network, VarAutoEncoder):
        seen: torch.Tensor = network.decode_forward(network.encode_forward(x)[0])
    else:
        seen = network(x)
    return seen


def loss_of(name: str, network: nn.Module, codes: Codes) -> Loss:
    """What is made small over a batch of slices (N, 1, H, W).

    Parameters
    ----------
    codes : callable
        For the transformer alone.
    """

    def variational(x: torch.Tensor) -> torch.Tensor:
        seen, mean, log_variance, _ = network(x)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss: torch.Tensor = (F.l1_loss(seen, x, reduction="sum") / len(x) + kl) / x[0].numel()
        return loss

    def next_code(x: torch.Tensor) -> torch.Tensor:
        known = codes(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=multiplies_bfloat16(x.device)):
            logits = network(shifted(network, known))
        loss: torch.Tensor = F.cross_entropy(logits.float().transpose(1, 2), known)
        return loss

    if name == "vae":
        return variational
    return next_code if name == "transformer" else lambda x: F.l1_loss(reconstruct(network, x), x)


def slice_codes(config: Config, folder: Path) -> Codes:
    """Slices -> codes (N, h w), by the bundle's own VQ-VAE."""
    networks = load_networks(folder, config)

    @torch.no_grad()
    def codes(x: torch.Tensor) -> torch.Tensor:
        known: torch.Tensor = networks.decoder.nearest(networks.encoder(x)).flatten(1)
        return known

    return codes


def bundle_folder(config: Config) -> Path:
    """The bundle that a configuration describes."""
    return ROOT / "models" / f"{config.name}-{config.version}"


@torch.no_grad()
def _validate(network: nn.Module, loss: Loss, stack: UInt16Array, batch: int) -> dict[str, float]:
    network.eval()
    some = stack[:: max(1, len(stack) // VALIDATION_SLICES)]
    x = torch.from_numpy(some.astype("float32") / UINT16_MAX)[:, None].to(device())
    mean = sum(float(loss(part)) * len(part) for part in x.split(batch)) / len(x)
    network.train()
    return {"val_loss": mean}


def run_of(opponent: Opponent, config: Config, network: nn.Module, data: str) -> Run:
    """Where it is kept, and what it belongs to: data, configuration, and its own budget."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=opponent.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / opponent.steps, 1))) + 1e-3
    )
    budget = repr(sorted(asdict(opponent).items()))
    return Run(f"opponent-{opponent.name}", config, data + budget, {"network": network}, optimiser, schedule)


def train(
    opponent: Opponent,
    config: Config,
    healthy: HealthySlices | None = None,
    codes: Codes | None = None,
    workers: int = 0,
) -> None:
    """Train, or go on training, one opponent of a bundle.

    Parameters
    ----------
    opponent : Opponent
    config : Config
    healthy : HealthySlices, optional
        Else what the configuration says.
    codes : callable, optional
        Else the bundle's.
    workers : int
        As of `training.loop.Limits`.
    """
    healthy = healthy or HealthySlices.of(config)
    torch.manual_seed(config.seed)
    network = build(opponent.name, config).to(device()).train()
    if opponent.name != "transformer":
        codes = _no_codes
    codes = codes or slice_codes(config, bundle_folder(config))
    loss = loss_of(opponent.name, network, codes)
    batches = Batches(healthy.train, opponent.batch, config.seed, config.augmentation)
    run = run_of(opponent, config, network, healthy.data)

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
        return _validate(network, loss, healthy.validation, opponent.batch) | {"seconds": time.monotonic() - started}

    every = max(1, opponent.steps // 10)
    run.train(batches, Limits().progress(opponent.steps), step_fn, validate, every, workers)


def load(opponent: Opponent, config: Config) -> nn.Module:
    """A finished opponent.

    Raises
    ------
    SystemExit
        It is not trained, or not to the end.
    """
    network = build(opponent.name, config).to(device())
    step = run_of(opponent, config, network, data_hash(config, load_split(config.data.splits).train)).resume()
    if step < opponent.steps:
        raise SystemExit(
            f"{opponent.name} of {config.name} is at step {step} of {opponent.steps}: "
            f"python -m training.experiments.opponents training/configs/{config.name}.toml {opponent.name}"
        )
    return network.eval().requires_grad_(requires_grad=False)


def _no_codes(_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("an autoencoder reads no codes")


if __name__ == "__main__":
    _config = Config.load(Path(sys.argv[1]))
    for _name in sys.argv[2:] or tuple(OPPONENTS):
        train(opponent_of(_name, _config.name), _config)
