"""Training on a machine that is lent by the minute and has neither the scans nor a network.

    python -m training.accelerator pack training/configs/t1.toml FOLDER       # here: slices, and what it goes on from
    python -m training.accelerator learn FOLDER/t1.xz OUT 90 240              # there: seconds of VQ-VAE and denoiser
    python -m training.accelerator unpack OUT/t1.part*                        # here: as if it had been trained here

What comes back is in parts of 15 MiB, written after each stage. The version goes into the configuration beforehand, the
steps that were learnt afterwards, by hand: `unpack` says which, and refuses a configuration that differs in anything
else.
"""

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
from training.loop import Limits, Run, start_from
from training.networks import build_denoiser, build_vqvae

STAGES = ("vqvae", "denoiser")
PART_BYTES = 15 << 20
WORKERS = 4
# Of 8 bits in 16: the pictures have no more, and the noise of the brains hides the rest.
STEP = 257

Packed = dict[str, Any]


def pack(config: Config, folder: Path) -> Path:
    """Write the slices of a configuration, and the weights that its stages start from, for `learn`."""
    packed: Packed = {
        **packed_slices(config),
        # Half precision is enough to start from.
        "start": {stage: _start(config, stage) for stage in STAGES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.xz"
    with lzma.open(path, "wb") as file:
        torch.save(packed, file)
    return path


def learn(path: Path, out: Path, seconds: Iterable[float], workers: int = WORKERS) -> None:
    """Learn each stage for so many seconds, and write what `unpack` reads.

    After each stage: what is there when the lease ends is not lost.

    Raises
    ------
    SystemExit
        There are runs of this version here.
    """
    packed = read_packed(lzma.decompress(path.read_bytes()))
    config = Config.model_validate_json(packed["config"])
    healthy = healthy_of(packed)
    _refuse_runs(config)
    for stage, weights in packed["start"].items():
        if weights:
            as_earlier(config, stage, weights)
    back: Packed = {"config": packed["config"], "data": packed["data"], "steps": {}, "weights": {}, "curves": {}}
    for stage, allowed in zip(STAGES, seconds, strict=True):
        train = {"vqvae": train_vqvae.train, "denoiser": train_denoiser.train}[stage]
        limits = Limits(allowed, workers) if getattr(config, stage).steps else Limits()
        back["steps"][stage] = train(config, healthy, limits)
        modules = read_packed((config.run_folder / f"{stage}.pt").read_bytes())["modules"]
        # The denoiser's last weights stay there: the averaged ones stand for them.
        back["weights"][stage] = modules["averaged" if stage == "denoiser" else stage]
        back["curves"][stage] = (config.run_folder / f"{stage}.csv").read_text()
        _write_parts(back, out, config.name)


def _refuse_runs(config: Config) -> None:
    """Weights of another training must neither be overwritten nor gone on from unseen."""
    for stage in STAGES:
        path = config.run_folder / f"{stage}.pt"
        if path.exists():
            raise SystemExit(f"{path} is there already: move it away, or raise the configuration's version.")


def _write_parts(back: Packed, out: Path, name: str) -> None:
    written = io.BytesIO()
    torch.save(back, written)
    whole = written.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for i, first in enumerate(range(0, len(whole), PART_BYTES)):
        (out / f"{name}.part{i:02}").write_bytes(whole[first : first + PART_BYTES])


def unpack(parts: Iterable[Path], configs: Path) -> dict[str, int]:
    """Put the weights where a training here would have put them; the steps that were learnt.

    Stages that were not reached are left out.

    Raises
    ------
    SystemExit
        The configuration is not the one that learnt, but for the steps; or there are runs of this version here.
    """
    back = read_packed(b"".join(path.read_bytes() for path in sorted(parts)))
    learnt = Config.model_validate_json(back["config"])
    config = Config.load(configs / f"{learnt.name}.toml")
    steps: dict[str, int] = back["steps"]
    stages = {stage: getattr(learnt, stage).model_copy(update={"steps": done}) for stage, done in steps.items()}
    if config != learnt.model_copy(update=stages):
        raise SystemExit(f"{learnt.name}.toml must be what learnt, with the steps {steps}.")
    _refuse_runs(config)
    for stage, weights in back["weights"].items():
        modules = _modules(config, stage, weights)
        optimiser = torch.optim.AdamW(next(iter(modules.values())).parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
        Run(stage, config, back["data"], modules, optimiser, schedule).save(steps[stage])
        (config.run_folder / f"{stage}.csv").write_text(back["curves"][stage])
    return steps


def _modules(config: Config, stage: str, weights: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
    """What a checkpoint of a stage holds."""
    if stage == "vqvae":
        vqvae = build_vqvae(config)
        vqvae.load_state_dict(weights)
        return {"vqvae": vqvae}
    averaged = torch.optim.swa_utils.AveragedModel(build_denoiser(config))
    averaged.load_state_dict(weights)
    return {"denoiser": averaged.module, "averaged": averaged}


def packed_slices(config: Config) -> Packed:
    """A configuration and its slices, in 8 bits."""
    healthy = HealthySlices.of(config)
    return {
        "config": config.model_dump_json(),
        "data": healthy.data,
        "train": _as_bytes(healthy.train),
        "validation": _as_bytes(healthy.validation),
    }


def _as_bytes(stack: UInt16Array) -> torch.Tensor:
    return torch.from_numpy(np.round(np.asarray(stack) / STEP).astype(np.uint8))


def healthy_of(packed: Packed) -> HealthySlices:
    """The slices of what `pack` wrote."""
    train, validation = (packed[part].numpy().astype(np.uint16) * np.uint16(STEP) for part in ("train", "validation"))
    return HealthySlices(train, validation, packed["data"])


def _start(config: Config, stage: str) -> dict[str, torch.Tensor]:
    """Weights that a stage goes on from; empty where it starts anew."""
    wanted = getattr(config, stage)
    learns = config.vqvae.steps or config.denoiser.steps
    if not wanted.warm_start or not learns:
        return {}
    module: nn.Module = build_vqvae(config) if stage == "vqvae" else build_denoiser(config)
    start_from(config, wanted.warm_start, stage, module, steps=1)
    half = stage == "denoiser"
    return {name: w.half() if half else w for name, w in module.state_dict().items()}


def as_earlier(config: Config, stage: str, weights: dict[str, torch.Tensor]) -> None:
    """Put weights where `start_from` looks for those of the earlier version."""
    earlier = config.model_copy(update={"version": getattr(config, stage).warm_start})
    path = earlier.run_folder / f"{stage}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"modules": {stage: weights}}, path)


def read_packed(data: bytes) -> Packed:
    """Tensors and plain values, on the CPU."""
    packed: Packed = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return packed


def main(arguments: list[str]) -> None:
    """One of the three commands."""
    command, *rest = arguments
    if command == "pack":
        path = pack(Config.load(Path(rest[0])), Path(rest[1]))
        sys.stdout.write(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB\n")
    elif command == "learn":
        learn(Path(rest[0]), Path(rest[1]), [float(s) for s in rest[2:]])
    elif command == "unpack":
        configs = Path(__file__).parent / "configs"
        sys.stdout.write(f"{unpack([Path(path) for path in rest], configs)}\n")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
