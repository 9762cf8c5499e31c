"""Tests of networks with the weights of a bundle, and of warm starts from it."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from training import config as configuration
from training.config import ROOT, Config
from training.loop import Batches, Run, TrainingOptions, load_modules, load_start_weights
from training.networks import Encoder, build_denoiser, build_vqvae, load_networks

pytestmark = pytest.mark.training

CONFIG = Config.load(ROOT / "training" / "configs" / "flair.toml")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a folder of the test for runs and bundles, with a link to the shipped bundles."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_weights_are_read_by_name(path: Path, tmp_path: Path) -> None:
    """The order of the initializers and the generic names of the exporter do not matter."""
    config = Config.load(path)
    copied = shutil.copytree(config.bundle_folder, tmp_path / config.bundle_folder.name)
    for name in ("encoder", "decoder", "denoiser"):
        model = onnx.load(copied / f"{name}.onnx")
        reversed_initializers = list(model.graph.initializer)[::-1]
        del model.graph.initializer[:]
        model.graph.initializer.extend(reversed_initializers)
        onnx.save(model, copied / f"{name}.onnx")
    load_networks(copied, config)  # raises if the golden pair is not reproduced


@pytest.mark.parametrize("update", [{"channels": (32, 64, 128, 64)}, {"residual_blocks": 2}])
def test_networks_of_another_configuration_are_refused(update: dict[str, object]) -> None:
    other = CONFIG.model_copy(update={"denoiser": CONFIG.denoiser.model_copy(update=update)})
    with pytest.raises(SystemExit, match="parameters"):
        load_networks(CONFIG.bundle_folder, other)


@pytest.mark.usefixtures("elsewhere")
def test_denoiser_starts_from_the_weights_of_a_bundle() -> None:
    denoiser = build_denoiser(CONFIG)
    load_start_weights(CONFIG, CONFIG.version, "denoiser", denoiser, steps=1)
    shipped = load_networks(CONFIG.bundle_folder, CONFIG).denoiser
    z, t = torch.randn(1, *(3, 48, 40), generator=torch.Generator().manual_seed(0)), torch.tensor([10])
    with torch.no_grad():
        assert float((denoiser.eval()(z, t) - shipped(z, t)).abs().max()) < 1e-6


@pytest.mark.usefixtures("elsewhere")
def test_stage_without_steps_starts_from_its_own_bundle() -> None:
    """A clean checkout has no bundle of the earlier version."""
    denoiser, again = build_denoiser(CONFIG), build_denoiser(CONFIG)
    load_start_weights(CONFIG, "0.0.1", "denoiser", denoiser, steps=0)
    load_start_weights(CONFIG, CONFIG.version, "denoiser", again, steps=1)
    for own, shipped in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, shipped)


@pytest.mark.usefixtures("elsewhere")
def test_vqvae_starts_from_the_codes_of_a_bundle_and_keeps_unused_ones() -> None:
    vqvae = build_vqvae(CONFIG)
    load_start_weights(CONFIG, CONFIG.version, "vqvae", vqvae, steps=1)
    shipped = load_networks(CONFIG.bundle_folder, CONFIG)
    x = torch.rand(2, 1, 96, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z0 = shipped.encoder(x)
        z = Encoder(vqvae.encoder, {"shift": shipped.encoder.shift, "scale": shipped.encoder.scale})(x)
        assert float((z - z0).abs().max()) < 1e-5
        before = vqvae.quantizer.quantizer.embedding.weight.clone()
        assert torch.equal(before, shipped.code_decoder.codes)
        vqvae.train()(x)  # one update of the moving averages
        moved = (vqvae.quantizer.quantizer.embedding.weight - before).norm(dim=1)
    # With moving averages that start at 0, unused codes would move to the origin.
    assert float(moved.median()) < 0.05 * float(before.norm(dim=1).median())


def test_vqvae_starts_from_the_codes_of_another_bundle() -> None:
    other = CONFIG.model_copy(update={"name": "another"})
    vqvae, own = build_vqvae(CONFIG), build_vqvae(CONFIG)
    load_start_weights(other, f"{CONFIG.name}-{CONFIG.version}", "vqvae", vqvae, steps=0)
    load_start_weights(CONFIG, CONFIG.version, "vqvae", own, steps=0)
    torch.testing.assert_close(vqvae.state_dict(), own.state_dict())


@pytest.mark.usefixtures("elsewhere")
def test_missing_version_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"0\.0\.1"):
        load_start_weights(CONFIG, "0.0.1", "denoiser", nn.Linear(1, 1), steps=1)


@pytest.mark.usefixtures("elsewhere")
def test_stage_without_steps_keeps_its_start_weights() -> None:
    network = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    run = Run("vqvae", CONFIG, "data", {"network": network}, optimiser, schedule)
    batches = Batches(np.zeros((4, 8, 8), np.uint16), 2, 0, None)
    run.train(batches, TrainingOptions().progress(0), lambda *_: pytest.fail("no step is run"), dict, 1)
    restored = nn.Linear(2, 1)
    assert load_modules(CONFIG, "vqvae", {"network": restored})["step"] == "0"
    np.testing.assert_array_equal(restored.weight.detach().numpy(), network.weight.detach().numpy())
