"""What both training stages share: checkpoints, progress, curves."""

import csv
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.config import NOT_OF_THE_SLICES, Config
from training.restore import stage_weights

CHECKPOINT_EVERY_SECONDS = 60
# A loss far from its mean is one odd batch; the bar shows an exponential mean.
SMOOTHING = 0.98
# Steps between two looks at it: each waits for a GPU.
SHOW_EVERY = 20


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bfloat16(where: torch.device) -> bool:
    """Whether products in bfloat16 are quicker there than in float32: on a GPU, and on a CPU with AMX."""
    return where.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def generator(*key: int) -> torch.Generator:
    """Random numbers on the device, the same for the same key."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device()).manual_seed(int(seed))


@dataclass(frozen=True)
class Progress:
    """Step -> the share of a stage that lies behind it: of its steps, or of its seconds since it was made.

    Attributes
    ----------
    steps : int
    seconds : float, optional
    started : float
        On the monotonic clock.
    """

    steps: int
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __call__(self, step: int) -> float:
        if self.seconds is not None:
            return min((time.monotonic() - self.started) / self.seconds, 1.0)
        return min(step / self.steps, 1.0) if self.steps else 1.0

    @property
    def total(self) -> int | None:
        """Steps, where they are known beforehand."""
        return None if self.seconds is not None else self.steps


@dataclass(frozen=True)
class Limits:
    """When a stage ends, and what feeds it.

    Attributes
    ----------
    seconds : float, optional
        Learn for so long instead of the configuration's steps: where an accelerator is lent by the minute. Of such a
        stage, one that was stopped starts its seconds and its learning rate again.
    workers : int
        Processes that make batches; 0 makes them between two steps, which is best where both take the same cores.
    """

    seconds: float | None = None
    workers: int = 0

    def progress(self, steps: int) -> Progress:
        """Of a stage that begins now."""
        return Progress(steps, self.seconds)


# What decides a stage's weights: a later section may change without losing an earlier stage.
SLICES = {"seed", "data", "preparation", "augmentation"}
SECTIONS = {
    "vqvae": SLICES | {"vqvae"},
    "denoiser": SLICES | {"vqvae", "coarse_noise", "schedule", "denoiser"},
    # Of `training.experiments.baselines`, the one that learns the VQ-VAE's codes; the others learn from slices alone.
    "opponent-transformer": SLICES | {"vqvae"},
}


def fingerprint(config: Config, stage: str, data: str) -> str:
    """What a checkpoint belongs to: its part of the configuration, and the data."""
    words = {"preparation": NOT_OF_THE_SLICES}
    decides = config.model_dump(mode="json", include=SECTIONS.get(stage, SLICES), exclude=words, exclude_none=True)
    return hashlib.sha256(json.dumps([decides, data], sort_keys=True).encode()).hexdigest()


@dataclass
class Run:
    """One training stage that can be stopped and started again.

    The checkpoint holds weights, optimiser, step, configuration and data hash, as tensors and
    plain values only.
    """

    name: str
    config: Config
    data: str
    modules: Mapping[str, nn.Module]
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @property
    def path(self) -> Path:
        return self.config.run_folder / f"{self.name}.pt"

    def save(self, step: int) -> None:
        """Write a checkpoint beside the old one, then put it in its place."""
        state: dict[str, Any] = {
            "step": step,
            "config": self.config.model_dump_json(),
            "data": self.data,
            "fingerprint": fingerprint(self.config, self.name, self.data),
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def resume(self) -> int:
        """Load the checkpoint if there is one; the step to go on from."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location=device(), weights_only=True)
        if state["fingerprint"] != fingerprint(self.config, self.name, self.data):
            raise SystemExit(
                f"{self.path} was trained with another configuration or other data: "
                "move it away, or raise the configuration's version."
            )
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        return int(state["step"])

    def train(
        self,
        batches: Dataset[torch.Tensor],
        progress: Progress,
        step_fn: Callable[[int, torch.Tensor], dict[str, torch.Tensor]],
        validate: Callable[[], dict[str, float]],
        validate_every: int,
        workers: int = 0,
    ) -> int:
        """Learn to the end, with a bar, a checkpoint now and then, and a curve as CSV; the last step.

        Parameters
        ----------
        batches : Dataset
            By step.
        progress : Progress
        step_fn : callable
            One step on a batch that lies on the device; its losses.
        validate : callable
        validate_every : int
            Steps.
        workers : int
            As of `Limits`.

        Raises
        ------
        SystemExit
            The time was over before the first step.
        """
        first = done = self.resume()
        shown: dict[str, torch.Tensor] = {}
        saved = time.monotonic()
        with tqdm(initial=done, total=progress.total, desc=self.name, unit="step", mininterval=5) as bar:
            for step, x in self._from(first, batches, progress, workers):
                for key, value in step_fn(step, x).items():
                    shown[key] = torch.lerp(shown.get(key, value), value, 1 - SMOOTHING)
                done = step + 1
                bar.update()
                if done % SHOW_EVERY == 0:
                    bar.set_postfix({k: f"{float(v):.4f}" for k, v in shown.items()}, refresh=False)
                if done % validate_every == 0:
                    self._log(done, {k: float(v) for k, v in shown.items()} | validate())
                if time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS:
                    self.save(done)
                    saved = time.monotonic()
        if progress.seconds is not None and not done:
            raise SystemExit(f"{self.name}: {progress.seconds:g} s were over before the first step.")
        if done > first or not done:
            # Where there is nothing to learn, the weights that it started from are this stage's.
            self.save(done)
        if (done > first and done % validate_every) or not done:
            self._log(done, {k: float(v) for k, v in shown.items()} | validate())
        return done

    @staticmethod
    def _from(
        first: int, batches: Dataset[torch.Tensor], progress: Progress, workers: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Steps that are left, and their batches on the device."""
        steps = itertools.count(first)
        pinned = device().type == "cuda"
        loader = DataLoader(batches, sampler=steps, batch_size=None, num_workers=workers, pin_memory=pinned)
        if progress(first) < 1:
            for step, x in zip(itertools.count(first), loader, strict=False):
                yield step, x.to(device(), non_blocking=True)
                if progress(step + 1) >= 1:
                    return

    def _log(self, step: int, row: dict[str, float]) -> None:
        path = self.config.run_folder / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *row])
            writer.writerow([step, *(f"{v:.6g}" for v in row.values())])


def start_from(config: Config, version: str, name: str, module: nn.Module, *, steps: int) -> None:
    """Load the last weights that a stage had in an earlier version of the bundle, where one is named.

    They come from that version's run, or from the bundle itself: there, a denoiser's are the averaged ones. A stage
    without steps of its own has them in its own bundle too.

    Raises
    ------
    SystemExit
        That version was neither trained here nor is it among the bundles.
    """
    if not version:
        return
    earlier = config.model_copy(update={"version": version})
    path = earlier.run_folder / f"{name}.pt"
    if path.exists():
        module.load_state_dict(torch.load(path, map_location=device(), weights_only=True)["modules"][name])
        return
    folders = [earlier.bundle_folder] + ([config.bundle_folder] if not steps else [])
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise SystemExit(
            f"Neither {path} nor {folders[-1]} is there: train version {version} from its own commit first, "
            "take its bundle from that commit, "
            'or set warm_start = "" to start anew, with more steps.'
        )
    module.load_state_dict(stage_weights(found, config, name))


def load_modules(config: Config, name: str, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Load a finished stage's weights; returns its provenance (step, data hash, fingerprint)."""
    path = config.run_folder / f"{name}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage `{name}` first.")
    state = torch.load(path, map_location=device(), weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
        module.eval()
    return {"step": str(state["step"]), "data": state["data"], "fingerprint": state["fingerprint"]}
