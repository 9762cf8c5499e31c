"""Tests of the training loop: end by steps or time, resumption, and batches of worker processes."""

import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from training.config import ROOT, Config  # noqa: E402
from training.loop import Batches, Run, TrainingOptions, fingerprint, make_generator  # noqa: E402

pytestmark = pytest.mark.training

CONFIG = Config.load(ROOT / "training" / "configs" / "headct.toml")
STACK = np.random.default_rng(0).integers(0, 65536, (16, 8, 8)).astype(np.uint16)
BATCHES = Batches(STACK, 4, 7, None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))


def fit_line(steps: int, options: TrainingOptions = TrainingOptions()) -> tuple[int, list[float]]:  # noqa: B008 - frozen
    """Fit a line to the mean of each batch, and return the number of steps and the means of the batches."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    means = []

    def step_fn(_: int, x: Tensor) -> dict[str, Tensor]:
        mean = x.mean()
        means.append(float(mean))
        loss = (network(mean[None]) - 2).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss.detach()}

    run = Run("vqvae", CONFIG, "data", {"network": network}, optimiser, schedule)
    return run.train(BATCHES, options.progress(steps), step_fn, lambda: {"val": 1.0}, 100, options.workers), means


def test_interrupted_run_resumes_with_the_remaining_batches(tmp_path: Path) -> None:
    assert fit_line(3)[0] == 3
    done, means = fit_line(7)
    assert done == 7
    assert means == [float(BATCHES[step].mean()) for step in range(3, 7)]
    curve = (tmp_path / "vqvae.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["step", "3", "7"]


def test_finished_run_is_not_changed(tmp_path: Path) -> None:
    fit_line(3)
    before = (tmp_path / "vqvae.pt").stat().st_mtime_ns, (tmp_path / "vqvae.csv").read_text()
    assert fit_line(3) == (3, [])
    assert ((tmp_path / "vqvae.pt").stat().st_mtime_ns, (tmp_path / "vqvae.csv").read_text()) == before


def test_run_ends_after_its_seconds() -> None:
    start = time.monotonic()
    done, _ = fit_line(10**9, TrainingOptions(seconds=0.5))
    assert done > 0
    assert time.monotonic() - start < 10


def test_worker_processes_load_the_same_batches() -> None:
    done, means = fit_line(5, TrainingOptions(workers=2))
    assert done == 5
    assert means == [float(BATCHES[step].mean()) for step in range(5)]


def test_random_numbers_depend_on_the_key() -> None:
    same, again, other = (torch.rand(3, generator=make_generator(*key)) for key in ((1, 3, 5), (1, 3, 5), (1, 3, 6)))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_baselines_on_slices_do_not_depend_on_the_vqvae() -> None:
    changed = CONFIG.model_copy(update={"vqvae": CONFIG.vqvae_settings.model_copy(update={"steps": 1})})
    same = {
        stage: fingerprint(CONFIG, stage, "data") == fingerprint(changed, stage, "data")
        for stage in ("vqvae", "denoiser", "baseline-transformer", "baseline-vae")
    }
    assert same == {"vqvae": False, "denoiser": False, "baseline-transformer": False, "baseline-vae": True}
