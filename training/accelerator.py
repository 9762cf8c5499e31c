"""Training on a machine that is lent by the minute and has no scans and no network connection.

    python -m training.accelerator pack training/configs/t1.toml FOLDER       # here: slices and start weights
    python -m training.accelerator train FOLDER/t1.xz OUT 90 240              # there: seconds of VQ-VAE and denoiser
    python -m training.accelerator unpack OUT/t1.part*                        # here: as if it had been trained here

The result comes in parts of 15 MiB, written after each stage. Raise the version in the configuration before `pack`.
Afterwards, write the numbers of steps into the configuration: `unpack` prints them and refuses any other difference.
"""

import argparse
import io
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training import train_denoiser, train_vqvae
from training.config import Config
from training.data import HealthySlices, UInt16Array
from training.loop import Run, TrainingOptions, load_start_weights
from training.networks import build_denoiser, build_vqvae

STAGES = ("vqvae", "denoiser")
PART_BYTES = 15 << 20
WORKERS = 4
# Slices are packed in 8 bits. Images have no more, and in volumes the noise is larger than a step.
STEP = 257

Packed = dict[str, Any]


def trained_stages(config: Config) -> tuple[str, ...]:
    """Return the stages of a configuration. Pixel latents are not trained."""
    return STAGES if config.pixel_latents is None else STAGES[1:]


def pack(config: Config, folder: Path) -> Path:
    """Write the slices of a configuration and the start weights of its stages for `train`."""
    packed: Packed = {
        **pack_slices(config),
        "start": {stage: _start_weights(config, stage) for stage in trained_stages(config)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.xz"
    with lzma.open(path, "wb") as file:
        torch.save(packed, file)
    return path


def train(path: Path, out: Path, seconds: Iterable[float], workers: int = WORKERS) -> None:
    """Train each stage for a number of seconds and write the input of `unpack`.

    Results are written after each stage, so that a lease that ends early loses only the current stage.

    Raises
    ------
    SystemExit
        This machine already has a run of this version.
    """
    packed = load_packed(lzma.decompress(path.read_bytes()))
    config = Config.model_validate_json(packed["config"])
    healthy = unpack_slices(packed)
    _refuse_runs(config)
    for stage, weights in packed["start"].items():
        if weights:
            save_start_weights(config, stage, weights)
    back: Packed = {"config": packed["config"], "data": packed["data"], "steps": {}, "weights": {}, "curves": {}}
    for stage, allowed in zip(STAGES, seconds, strict=True):
        if stage not in trained_stages(config):
            continue
        train_stage = {"vqvae": train_vqvae.train, "denoiser": train_denoiser.train}[stage]
        options = TrainingOptions(allowed, workers) if getattr(config, stage).steps else TrainingOptions()
        back["steps"][stage] = train_stage(config, healthy, options)
        modules = load_packed((config.run_folder / f"{stage}.pt").read_bytes())["modules"]
        # Only the averaged weights of the denoiser are kept.
        back["weights"][stage] = modules["averaged" if stage == "denoiser" else stage]
        back["curves"][stage] = (config.run_folder / f"{stage}.csv").read_text()
        _write_parts(back, out, config.name)


def _refuse_runs(config: Config) -> None:
    """Raise SystemExit if there is a run of this version, because it must not be overwritten or resumed."""
    for stage in trained_stages(config):
        path = config.run_folder / f"{stage}.pt"
        if path.exists():
            raise SystemExit(f"{path} already exists. Move it away, or raise the version in the configuration.")


def _write_parts(back: Packed, out: Path, name: str) -> None:
    written = io.BytesIO()
    torch.save(back, written)
    whole = written.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for i, first in enumerate(range(0, len(whole), PART_BYTES)):
        (out / f"{name}.part{i:02}").write_bytes(whole[first : first + PART_BYTES])


def unpack(parts: Iterable[Path], configs: Path) -> dict[str, int]:
    """Write the checkpoints and curves of the completed stages, and return their numbers of steps.

    Raises
    ------
    SystemExit
        The configuration differs from the packed one in more than the steps, or there is a run of this version.
    """
    back = load_packed(b"".join(path.read_bytes() for path in sorted(parts)))
    trained = Config.model_validate_json(back["config"])
    config = Config.load(configs / f"{trained.name}.toml")
    steps: dict[str, int] = back["steps"]
    stages = {stage: getattr(trained, stage).model_copy(update={"steps": done}) for stage, done in steps.items()}
    if config != trained.model_copy(update=stages):
        raise SystemExit(
            f"{trained.name}.toml differs from the packed configuration. Expected the same with the steps {steps}. "
            "Restore it and set the steps."
        )
    _refuse_runs(config)
    for stage, weights in back["weights"].items():
        modules = _checkpoint_modules(config, stage, weights)
        optimiser = torch.optim.AdamW(next(iter(modules.values())).parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
        Run(stage, config, back["data"], modules, optimiser, schedule).save(steps[stage])
        (config.run_folder / f"{stage}.csv").write_text(back["curves"][stage])
    return steps


def _checkpoint_modules(config: Config, stage: str, weights: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Return the modules of a stage's checkpoint."""
    if stage == "vqvae":
        vqvae = build_vqvae(config)
        vqvae.load_state_dict(weights)
        return {"vqvae": vqvae}
    averaged = torch.optim.swa_utils.AveragedModel(build_denoiser(config))
    averaged.load_state_dict(weights)
    return {"denoiser": averaged.module, "averaged": averaged}


def pack_slices(config: Config) -> Packed:
    """Return a configuration and its slices in 8 bits."""
    healthy = HealthySlices.of(config)
    return {
        "config": config.model_dump_json(),
        "data": healthy.data,
        "train": _as_bytes(healthy.train),
        "validation": _as_bytes(healthy.validation),
    }


def _as_bytes(stack: UInt16Array) -> torch.Tensor:
    return torch.from_numpy(np.round(np.asarray(stack) / STEP).astype(np.uint8))


def unpack_slices(packed: Packed) -> HealthySlices:
    """Return the slices that `pack` wrote."""
    train, validation = (packed[part].numpy().astype(np.uint16) * np.uint16(STEP) for part in ("train", "validation"))
    return HealthySlices(train, validation, packed["data"])


def _start_weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    """Return the start weights of a stage, those of the denoiser in half precision. Empty without a warm start."""
    settings = getattr(config, stage)
    is_trained = config.denoiser.steps or (config.vqvae is not None and config.vqvae.steps)
    if not settings.warm_start or not is_trained:
        return {}
    module: nn.Module = build_vqvae(config) if stage == "vqvae" else build_denoiser(config)
    load_start_weights(config, settings.warm_start, stage, module, steps=1)
    half = stage == "denoiser"
    return {name: w.half() if half else w for name, w in module.state_dict().items()}


def save_start_weights(config: Config, stage: str, weights: dict[str, torch.Tensor]) -> None:
    """Write weights to the run of the earlier version, from which `load_start_weights` reads them."""
    earlier = config.model_copy(update={"version": getattr(config, stage).warm_start})
    path = earlier.run_folder / f"{stage}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"modules": {stage: weights}}, path)


def load_packed(data: bytes) -> Packed:
    """Read tensors and plain values to the CPU."""
    packed: Packed = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return packed


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack")
    command.add_argument("config", type=Path)
    command.add_argument("folder", type=Path)
    command = commands.add_parser("train")
    command.add_argument("packed", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument(
        "seconds",
        type=float,
        nargs=len(STAGES),
        help="training time of VQ-VAE and denoiser. The first one has no effect on pixel latents",
    )
    command = commands.add_parser("unpack")
    command.add_argument("parts", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "pack":
        path = pack(Config.load(options.config), options.folder)
        sys.stdout.write(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB\n")
    elif options.command == "train":
        train(options.packed, options.out, options.seconds)
    else:
        sys.stdout.write(f"{unpack(options.parts, Path(__file__).parent / 'configs')}\n")


if __name__ == "__main__":
    main()
