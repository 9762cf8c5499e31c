"""Opponents learn, stop and go on; the transformer's healing changes unlikely codes alone."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training.config import ROOT, Config  # noqa: E402
from training.data import HealthySlices  # noqa: E402
from training.experiments import opponents  # noqa: E402

pytestmark = pytest.mark.training


@pytest.fixture
def config() -> Config:
    return Config.load(ROOT / "training" / "configs" / "headct.toml")


@pytest.mark.parametrize("name", ["dense-ae", "spatial-ae", "vae"])
def test_autoencoders_learn_a_picture(name: str, config: Config) -> None:
    torch.manual_seed(0)
    network = opponents.build(name, config).train()
    loss = opponents.loss_of(name, network, lambda x: x)
    x = torch.rand(4, 1, 64, 64).cumsum(-1) / 64
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        value = loss(x)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert opponents.reconstruct(network.eval(), x).shape == x.shape


def test_an_unfinished_opponent_is_not_used(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a budget would be an easy opponent."""
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))
    monkeypatch.setattr(opponents, "data_hash", lambda *_: "data")
    stack = np.full((32, 64, 64), 30000, np.uint16)
    healthy = HealthySlices(stack, stack, "data")
    short = opponents.Opponent("spatial-ae", "short", 2, 4, 1e-3)
    longer = opponents.Opponent("spatial-ae", "short", 4, 4, 1e-3)
    with pytest.raises(SystemExit, match="step 0 of 2"):
        opponents.load(short, config)
    opponents.train(short, config, healthy)
    assert not opponents.load(short, config).training
    assert (tmp_path / "opponent-spatial-ae.csv").read_text().count("\n") == 3
    with pytest.raises(SystemExit, match="another configuration"):
        opponents.load(longer, config)
