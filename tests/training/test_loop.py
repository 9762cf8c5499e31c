"""A stage ends when its steps or its seconds are over, goes on where it stopped, and is fed the same by others."""

import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from training.config import ROOT, Config  # noqa: E402
from training.data import Batches  # noqa: E402
from training.loop import Limits, Run, fingerprint, generator  # noqa: E402

pytestmark = pytest.mark.training

CONFIG = Config.load(ROOT / "training" / "configs" / "headct.toml")
STACK = np.random.default_rng(0).integers(0, 65536, (16, 8, 8)).astype(np.uint16)
BATCHES = Batches(STACK, 4, 7, None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))


def learn(steps: int, limits: Limits = Limits()) -> tuple[int, list[float]]:  # noqa: B008 - frozen
    """A line through the mean of each batch; the last step, and the means that were seen."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    seen = []

    def step_fn(_: int, x: Tensor) -> dict[str, Tensor]:
        mean = x.mean()
        seen.append(float(mean))
        loss = (network(mean[None]) - 2).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss.detach()}

    run = Run("vqvae", CONFIG, "data", {"network": network}, optimiser, schedule)
    return run.train(BATCHES, limits.progress(steps), step_fn, lambda: {"val": 1.0}, 100, limits.workers), seen


def test_a_run_that_was_stopped_goes_on_with_the_batches_that_are_left(tmp_path: Path) -> None:
    assert learn(3)[0] == 3
    done, seen = learn(7)
    assert done == 7
    assert seen == [float(BATCHES[step].mean()) for step in range(3, 7)]
    curve = (tmp_path / "vqvae.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["step", "3", "7"]


def test_a_finished_run_learns_nothing_and_writes_nothing(tmp_path: Path) -> None:
    learn(3)
    before = (tmp_path / "vqvae.pt").stat().st_mtime_ns, (tmp_path / "vqvae.csv").read_text()
    assert learn(3) == (3, [])
    assert ((tmp_path / "vqvae.pt").stat().st_mtime_ns, (tmp_path / "vqvae.csv").read_text()) == before


def test_it_ends_when_its_seconds_are_over() -> None:
    start = time.monotonic()
    done, _ = learn(10**9, Limits(seconds=0.5))
    assert done > 0
    assert time.monotonic() - start < 10


def test_other_processes_make_the_same_batches() -> None:
    done, seen = learn(5, Limits(workers=2))
    assert done == 5
    assert seen == [float(BATCHES[step].mean()) for step in range(5)]


def test_random_numbers_belong_to_their_key() -> None:
    same, again, other = (torch.rand(3, generator=generator(*key)) for key in ((1, 3, 5), (1, 3, 5), (1, 3, 6)))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_an_autoencoder_of_the_experiments_stays_when_the_vqvae_changes() -> None:
    changed = CONFIG.model_copy(update={"vqvae": CONFIG.vqvae.model_copy(update={"steps": 1})})
    same = {
        stage: fingerprint(CONFIG, stage, "data") == fingerprint(changed, stage, "data")
        for stage in ("vqvae", "denoiser", "opponent-transformer", "opponent-vae")
    }
    assert same == {"vqvae": False, "denoiser": False, "opponent-transformer": False, "opponent-vae": True}
