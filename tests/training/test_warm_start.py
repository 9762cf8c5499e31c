"""A stage goes on from the bundle of an earlier version, whose run is not at hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training import config as configuration
from training.config import ROOT, Config
from training.data import Batches
from training.loop import Limits, Run, load_modules, start_from
from training.networks import Encode, build_denoiser, build_vqvae
from training.restore import load_networks

CONFIG = Config.load(ROOT / "training" / "configs" / "flair.toml")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and bundles in a folder of the test, with the shipped bundles in it."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
def test_a_denoiser_starts_from_the_averaged_weights_of_a_bundle() -> None:
    denoiser = build_denoiser(CONFIG)
    start_from(CONFIG, CONFIG.version, "denoiser", denoiser, steps=1)
    shipped = load_networks(CONFIG.bundle_folder, CONFIG).denoiser
    z, t = torch.randn(1, *(3, 48, 40), generator=torch.Generator().manual_seed(0)), torch.tensor([10])
    with torch.no_grad():
        assert float((denoiser.eval()(z, t) - shipped(z, t)).abs().max()) < 1e-6


@pytest.mark.usefixtures("elsewhere")
def test_a_stage_without_steps_finds_its_weights_in_its_own_bundle() -> None:
    """From a clean checkout, where the earlier version is no more."""
    denoiser, again = build_denoiser(CONFIG), build_denoiser(CONFIG)
    start_from(CONFIG, "0.0.1", "denoiser", denoiser, steps=0)
    start_from(CONFIG, CONFIG.version, "denoiser", again, steps=1)
    for mine, shipped in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, shipped)


@pytest.mark.usefixtures("elsewhere")
def test_a_vqvae_starts_with_the_codes_of_a_bundle_and_keeps_them_while_it_learns() -> None:
    vqvae = build_vqvae(CONFIG)
    start_from(CONFIG, CONFIG.version, "vqvae", vqvae, steps=1)
    shipped = load_networks(CONFIG.bundle_folder, CONFIG)
    x = torch.rand(2, 1, 96, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z0 = shipped.encoder(x)
        mine = Encode(vqvae, {"shift": shipped.encoder.shift, "scale": shipped.encoder.scale})(x)
        assert float((mine - z0).abs().max()) < 1e-5
        before = vqvae.quantizer.quantizer.embedding.weight.clone()
        assert torch.equal(before, shipped.decoder.codes)
        vqvae.train()(x)  # a step of the moving averages
        moved = (vqvae.quantizer.quantizer.embedding.weight - before).norm(dim=1)
    # Averages that started at nothing would throw unused codes to the origin.
    assert float(moved.median()) < 0.05 * float(before.norm(dim=1).median())


@pytest.mark.usefixtures("elsewhere")
def test_a_version_that_is_nowhere_is_refused_with_a_way_out() -> None:
    with pytest.raises(SystemExit, match=r"train version 0\.0\.1 from its own commit first"):
        start_from(CONFIG, "0.0.1", "denoiser", nn.Linear(1, 1), steps=1)


@pytest.mark.usefixtures("elsewhere")
def test_a_stage_of_no_steps_keeps_what_it_started_from() -> None:
    network = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    run = Run("vqvae", CONFIG, "data", {"network": network}, optimiser, schedule)
    batches = Batches(np.zeros((4, 8, 8), np.uint16), 2, 0, None)
    run.train(batches, Limits().progress(0), lambda *_: pytest.fail("nothing is learnt"), dict, 1)
    restored = nn.Linear(2, 1)
    assert load_modules(CONFIG, "vqvae", {"network": restored})["step"] == "0"
    np.testing.assert_array_equal(restored.weight.detach().numpy(), network.weight.detach().numpy())
