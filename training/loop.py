"""What both training stages share: checkpoints, progress, curves."""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.config import NOT_OF_THE_SLICES, Config
from training.restore import stage_weights

CHECKPOINT_EVERY = 200
# A loss far from its mean is one odd batch; the bar shows an exponential mean.
SMOOTHING = 0.98


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# What decides a stage's weights: a later section may change without losing an earlier stage. What stands beside
# the bundle (`training.experiments.opponents`) goes with its VQ-VAE.
SECTIONS = {
    "vqvae": {"seed", "data", "preparation", "augmentation", "vqvae"},
    "denoiser": {"seed", "data", "preparation", "augmentation", "vqvae", "coarse_noise", "schedule", "denoiser"},
}


def fingerprint(config: Config, stage: str, data: str) -> str:
    """What a checkpoint belongs to: its part of the configuration, and the data."""
    words = {"preparation": NOT_OF_THE_SLICES}
    decides = config.model_dump(
        mode="json", include=SECTIONS.get(stage, SECTIONS["vqvae"]), exclude=words, exclude_none=True
    )
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
        steps: int,
        step_fn: Callable[[int], dict[str, float]],
        validate: Callable[[], dict[str, float]],
        validate_every: int,
    ) -> None:
        """Run to `steps`, with a bar, a checkpoint now and then, and a curve as CSV."""
        start = self.resume()
        shown: dict[str, float] = {}
        with tqdm(range(start, steps), initial=start, total=steps, desc=self.name, unit="step", mininterval=5) as bar:
            for step in bar:
                losses = step_fn(step)
                for key, value in losses.items():
                    shown[key] = SMOOTHING * shown.get(key, value) + (1 - SMOOTHING) * value
                bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
                done = step + 1
                if done % validate_every == 0 or done == steps:
                    self._log(done, {**shown, **validate()})
                if done % CHECKPOINT_EVERY == 0 or done == steps:
                    self.save(done)
        if not steps:
            # Nothing to learn: the weights that it started from are this stage's.
            self.save(0)
            self._log(0, validate())

    def _log(self, step: int, row: dict[str, float]) -> None:
        path = self.config.run_folder / f"{self.name}.csv"
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
