"""Training loop of both stages: batches, checkpoints, progress and training curves."""

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

from training.augment import augment
from training.config import NON_PIXEL_FIELDS, AugmentationConfig, Config
from training.data import UINT16_MAX, UInt16Array
from training.networks import matching_denoiser_weights, stage_weights

CHECKPOINT_EVERY_SECONDS = 60
# Decay of the exponential mean of the losses in the progress bar.
SMOOTHING = 0.98
# Steps between two updates of the shown losses: each update waits for the GPU.
SHOW_EVERY = 20

# Sections of the configuration that determine the weights of a run, by the start of its name. Other changes keep its
# checkpoint.
SLICES = {"seed", "data", "preprocessing", "augmentation"}
SECTIONS = {
    "vqvae": SLICES | {"vqvae"},
    "denoiser": SLICES | {"vqvae", "pixel_latents", "coarse_noise", "schedule", "denoiser"},
    # The baseline of training/experiments that is trained on the codes of the VQ-VAE. All others use only slices.
    "baseline-transformer": SLICES | {"vqvae"},
    "denoising-autoencoder": SLICES | {"coarse_noise"},
}


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(where: torch.device) -> bool:
    """Return whether products in bfloat16 are faster than in float32: on a GPU, and on a CPU with AMX."""
    return where.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def make_generator(*key: int) -> torch.Generator:
    """Return a random generator on the device that is seeded by a key."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device()).manual_seed(int(seed))


@dataclass(frozen=True)
class Batches(Dataset[torch.Tensor]):
    """Batches of slices by step: the same for the same seed and step, however often a run is interrupted."""

    stack: UInt16Array
    size: int
    seed: int
    augmentation: AugmentationConfig | None

    def __getitem__(self, step: int) -> torch.Tensor:
        """Return the batch of one step, (B, 1, H, W) in [0, 1]."""
        rng = np.random.default_rng([self.seed, step])
        # Each epoch draws without replacement: the order is a permutation keyed by the epoch.
        first = step * self.size
        epoch, start = divmod(first, len(self.stack) - len(self.stack) % self.size)
        order = np.random.default_rng([self.seed, 1_000_003, epoch]).permutation(len(self.stack))
        chosen = np.sort(order[start : start + self.size])
        x = torch.from_numpy(self.stack[chosen].astype(np.float32) / UINT16_MAX)[:, None]
        return augment(x, self.augmentation, rng) if self.augmentation else x


@dataclass(frozen=True)
class Progress:
    """Completed share of a stage as a function of the step: of its steps, or of its seconds since the start.

    Attributes
    ----------
    steps : int
    seconds : float, optional
        Duration that replaces the number of steps.
    started : float
        Monotonic clock at the start.
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
        """Number of steps; None if the stage ends by time."""
        return None if self.seconds is not None else self.steps


@dataclass(frozen=True)
class TrainingOptions:
    """End of a stage, and the processes that load its batches.

    Attributes
    ----------
    seconds : float, optional
        Train for this time in place of the configured steps, on an accelerator that is lent by the minute. If such a
        stage is interrupted, its time and its learning-rate schedule start again.
    workers : int
        Processes that load batches. 0 loads them between two steps, which is best if both share the same cores.
    """

    seconds: float | None = None
    workers: int = 0

    def progress(self, steps: int) -> Progress:
        """Return the progress of a stage that starts now."""
        return Progress(steps, self.seconds)


def fingerprint(config: Config, stage: str, data: str) -> str:
    """Return the SHA-256 of the sections and the data that determine the weights of a stage."""
    decides = config.model_dump(
        mode="json",
        include=next((sections for name, sections in SECTIONS.items() if stage.startswith(name)), SLICES),
        exclude={"preprocessing": NON_PIXEL_FIELDS},
        exclude_none=True,
    )
    return hashlib.sha256(json.dumps([decides, data], sort_keys=True).encode()).hexdigest()


@dataclass
class Run:
    """Training stage that can be interrupted and resumed.

    The checkpoint contains only tensors and plain values: weights, optimiser, step, configuration and data hash.
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
        """Write a checkpoint, atomically."""
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
        """Load the checkpoint, if any, and return the next step.

        Raises
        ------
        SystemExit
            The checkpoint belongs to another configuration or to other data.
        """
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location=device(), weights_only=True)
        if state["fingerprint"] != fingerprint(self.config, self.name, self.data):
            raise SystemExit(
                f"{self.path} was trained with another configuration or other data. "
                "Move it away, or raise the version in the configuration."
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
        """Train to the end with a progress bar, checkpoints, and a training curve as CSV.

        Parameters
        ----------
        batches : Dataset
            Batches by step.
        progress : Progress
        step_fn : callable
            Runs one step on a batch on the device and returns its losses.
        validate : callable
            Returns the validation losses.
        validate_every : int
            Steps between two validations.
        workers : int
            See `TrainingOptions`.

        Returns
        -------
        int
            Number of completed steps.

        Raises
        ------
        SystemExit
            The time ended before the first step.
        """
        first = done = self.resume()
        shown: dict[str, torch.Tensor] = {}
        saved = time.monotonic()
        with tqdm(initial=done, total=progress.total, desc=self.name, unit="step", mininterval=5) as bar:
            for step, x in self._batches_from(first, batches, progress, workers):
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
            raise SystemExit(f"{self.name}: {progress.seconds:g} s ended before the first step. Allow more time.")
        if done > first or not done:
            # A stage without steps keeps the weights it started from.
            self.save(done)
        if (done > first and done % validate_every) or not done:
            self._log(done, {k: float(v) for k, v in shown.items()} | validate())
        return done

    @staticmethod
    def _batches_from(
        first: int, batches: Dataset[torch.Tensor], progress: Progress, workers: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the remaining steps and their batches on the device."""
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


def load_start_weights(config: Config, version: str, name: str, module: nn.Module, *, steps: int) -> None:
    """Load the last weights of a stage from an earlier version of the bundle or from another bundle, if one is given.

    They are read from the run of that version, else from its bundle, which has the averaged weights of the denoiser. A
    stage without steps also finds them in its own bundle.

    Raises
    ------
    SystemExit
        There is no run and no bundle of that version.
    """
    if not version:
        return
    other = config.bundle_folder.with_name(version)
    if other.is_dir():
        is_denoiser = name == "denoiser"
        weights = matching_denoiser_weights(other, module) if is_denoiser else stage_weights(other, config, name)
        module.load_state_dict(weights)
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
            f"Neither {path} nor {folders[-1]} exists. Set warm_start to a version in models/, or train "
            f'version {version} from its own commit, or set warm_start = "" and thousands of steps for random weights.'
        )
    module.load_state_dict(stage_weights(found, config, name))


def load_modules(config: Config, name: str, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Load the weights of a finished stage and return its provenance: step, data hash and fingerprint.

    Raises
    ------
    SystemExit
        The stage was not run.
    """
    path = config.run_folder / f"{name}.pt"
    if not path.exists():
        raise SystemExit(f"{path} does not exist. Run the stage `{name}` first.")
    state = torch.load(path, map_location=device(), weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])
        module.eval()
    return {"step": str(state["step"]), "data": state["data"], "fingerprint": state["fingerprint"]}
