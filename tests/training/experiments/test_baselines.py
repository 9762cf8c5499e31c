"""Training of the baselines."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training.config import ROOT, Config  # noqa: E402
from training.data import HealthySlices  # noqa: E402
from training.experiments import baselines  # noqa: E402
from training.experiments.methods import Budget  # noqa: E402

pytestmark = pytest.mark.training


@pytest.fixture
def config() -> Config:
    return Config.load(ROOT / "training" / "configs" / "headct.toml")


@pytest.mark.parametrize("name", ["dense-ae", "spatial-ae", "vae"])
def test_autoencoder_loss_falls(name: str, config: Config) -> None:
    torch.manual_seed(0)
    network = baselines.build(name, config).train()
    loss = baselines.loss_of(name, network, None)
    x = torch.rand(4, 1, 64, 64).cumsum(-1) / 64
    # At three times this rate, the KL of the VAE jumps, and the last loss depends on the processor.
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        value = loss(x)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert baselines.reconstruct(network.eval(), x).shape == x.shape


def test_unfinished_baseline_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))
    monkeypatch.setattr(baselines, "data_hash", lambda *_: "data")
    stack = np.full((32, 64, 64), 30000, np.uint16)
    healthy = HealthySlices(stack, stack, "data")
    short = Budget("spatial-ae", 2, 4, 1e-3)
    longer = Budget("spatial-ae", 4, 4, 1e-3)
    with pytest.raises(SystemExit, match="0 of 2 steps"):
        baselines.load(short, config)
    baselines.train(short, config, healthy)
    assert not baselines.load(short, config).training
    assert (tmp_path / "baseline-spatial-ae-2x4.csv").read_text().count("\n") == 3
    with pytest.raises(SystemExit, match="0 of 4 steps"):  # another budget has another checkpoint
        baselines.load(longer, config)
