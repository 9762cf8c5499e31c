"""Denoising autoencoder: its output before and after training."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from training.config import ROOT, Config
from training.data import HealthySlices
from training.experiments import denoising_autoencoder
from training.experiments.denoising_autoencoder import DenoisingAutoencoder, denoising_loss

pytestmark = pytest.mark.training


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))
    return Config.load(ROOT / "training" / "configs" / "t1.toml")


def test_output_of_an_untrained_autoencoder_is_near_its_input(config: Config) -> None:
    """The U-Net begins with a last layer of zeros, so that it changes nothing."""
    torch.manual_seed(0)
    x = torch.rand(2, 1, 32, 48)
    x[:, :, :8] = 0
    restored = DenoisingAutoencoder(config)(x)
    torch.testing.assert_close(restored, x)
    with torch.no_grad():
        loss = denoising_loss(DenoisingAutoencoder(config), x, config, torch.Generator().manual_seed(1))
    assert float(loss) > 0


def test_training_resumes_and_starts_from_the_denoiser(config: Config) -> None:
    stack = np.random.default_rng(0).integers(20_000, 50_000, (32, 32, 32)).astype(np.uint16)
    healthy = HealthySlices(stack, stack, "data")
    assert denoising_autoencoder.train(config, healthy, steps=2) == 2
    assert denoising_autoencoder.train(config, healthy, steps=2) == 2  # resumed, nothing to do
    weights = denoising_autoencoder.load(config, steps=2).state_dict()
    torch.manual_seed(config.seed)
    fresh = DenoisingAutoencoder(config).state_dict()
    name = "unet.middle_block.resnet_1.conv1.conv.weight"
    assert (weights[name] - fresh[name]).abs().mean() > 1e-3
    with pytest.raises(SystemExit, match="another configuration or other data"):
        denoising_autoencoder.train(config, HealthySlices(stack, stack, "others"), steps=2)
    with pytest.raises(SystemExit, match="2 of 3 steps"):
        denoising_autoencoder.load(config, steps=3)
