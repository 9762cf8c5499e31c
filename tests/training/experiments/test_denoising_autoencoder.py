"""Denoising autoencoder: its training, its anomaly map and the page of the comparison."""

from pathlib import Path

import numpy as np
import pytest
import torch

from app.manifest import Manifest, View
from app.runtime.bundle import read_manifest
from app.volume import Volume
from tests.support.phantom import brain
from training.config import ROOT, Config
from training.data import HealthySlices
from training.experiments import denoising_autoencoder
from training.experiments.cases import Case, make_case
from training.experiments.denoising_autoencoder import DenoisingAutoencoder, autoencoder_map, denoising_loss, page

pytestmark = pytest.mark.training


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(Config, "run_folder", property(lambda _: tmp_path))
    return Config.load(ROOT / "training" / "configs" / "t1.toml")


@pytest.fixture
def manifest(tiny_models: Path) -> Manifest:
    return read_manifest(next(path.parent for path in tiny_models.glob("tiny-*/manifest.json")))


@pytest.fixture
def case(manifest: Manifest) -> Case:
    volume: Volume = brain()
    return make_case("subject", "healthy", volume, np.zeros(volume.shape, np.bool_), manifest)


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


def test_training_resumes_and_starts_from_the_denoiser(config: Config, tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(20_000, 50_000, (32, 32, 32)).astype(np.uint16)
    healthy = HealthySlices(stack, stack, "data")
    assert denoising_autoencoder.train(config, healthy, steps=2) == 2
    assert denoising_autoencoder.train(config, healthy, steps=2) == 2  # resumed, nothing to do
    weights = torch.load(tmp_path / "denoising-autoencoder.pt", weights_only=True)["modules"]["network"]
    torch.manual_seed(config.seed)
    fresh = DenoisingAutoencoder(config).state_dict()
    name = "unet.middle_block.resnet_1.conv1.conv.weight"
    assert (weights[name] - fresh[name]).abs().mean() > 1e-3
    with pytest.raises(SystemExit, match="another configuration or other data"):
        denoising_autoencoder.train(config, HealthySlices(stack, stack, "others"), steps=2)


def test_map_is_the_mean_difference_over_views(case: Case, manifest: Manifest) -> None:
    class Darker(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 0.25 * (x > 0)

    plain = manifest.model_copy(
        update={"residual": manifest.residual.model_copy(update={"smoothing_mm": 0.0, "median_pixels": 1})}
    )
    values = autoencoder_map(Darker(), plain, (View(), View(mirrored=True, shift=(1, 1))))(case)
    assert values.shape == case.truth.shape
    inside = case.evaluated & (case.x[:, 0] > 0.25)
    np.testing.assert_allclose(values[inside], 0.25, atol=1e-5)
    assert not values[~case.foreground].any()


def test_page_has_one_row_for_each_method() -> None:
    scores = {key: [0.5, 0.4, 0.6] for key in ("auprc", "best_dice", "dice")}
    row = {"method": "some method", "ms_per_slice": 12.34, "false_ml": [1.0, 0.5, 2.0]}
    row |= dict.fromkeys(denoising_autoencoder.GRADES, scores)
    document = {
        "bundle": "t1-1.0.0",
        "steps": 7,
        "start": "t1-0.9.0",
        "note": "A note.",
        "false_positive_ml": 1.0,
        "rows": [row],
    }
    text = page(document)
    assert "| some method | 12.3 | 1.00 [0.50, 2.00] | 0.50 [0.40, 0.60] |" in text
    assert "A note." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
