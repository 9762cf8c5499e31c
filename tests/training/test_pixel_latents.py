"""Latents that are blocks of pixels: nothing is lost, and every stage of the training runs with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training import config as configuration
from training import export, train_denoiser
from training.config import ROOT, Config, PixelLatentsConfig
from training.data import HealthySlices
from training.latents import load_coders
from training.loop import load_start_weights
from training.networks import build_denoiser, load_networks, matching_denoiser_weights
from training.quantise import noise_levels

pytestmark = pytest.mark.training

SHAPE = (16, 32)
STACK = np.random.default_rng(0).integers(20_000, 50_000, (160, *SHAPE)).astype(np.uint16)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the configuration of T1 with pixels as latents and two steps."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    whole = Config.load(ROOT / "training" / "configs" / "t1.toml")
    return whole.model_copy(
        update={
            "name": "pixels",
            "version": "0.0.1",
            "vqvae": None,
            "pixel_latents": PixelLatentsConfig(fold=2),
            "preprocessing": whole.preprocessing.model_copy(update={"shape": SHAPE}),
            "denoiser": whole.denoiser.model_copy(update={"warm_start": "", "steps": 2, "batch": 4}),
        }
    )


def test_latents_are_folded_pixels(config: Config) -> None:
    assert config.latent_shape == (4, 8, 16)
    assert config.downsampling == 2


def test_nothing_is_lost(config: Config) -> None:
    encoder, decoder, provenance = load_coders(config, STACK)
    x = torch.from_numpy(STACK[:3].astype(np.float32) / 65535)[:, None]
    z0 = encoder(x)
    assert z0.shape == (3, *config.latent_shape)
    assert float(z0.std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(decoder(z0), x)
    assert provenance == {"step": "0"}


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_trained_and_exported_networks_agree(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.export.cached_slices", lambda *_: STACK)
    monkeypatch.setattr("training.latents.cached_slices", lambda *_: STACK)
    plain = config.model_copy(update={"export": config.export.model_copy(update={"int8": False})})
    assert train_denoiser.train(plain, HealthySlices(STACK, STACK, "data")) == 2
    parity = export.export(plain)
    assert max(parity.encoder, parity.denoiser, parity.decoder_flipped) < 1e-3
    with np.load(export.graphs_folder(plain) / "golden.npz") as golden:
        assert golden["t"].tolist() == noise_levels(plain)  # every time step that serving uses
    networks = load_networks(export.graphs_folder(plain), plain)  # raises if the golden pair is not reproduced
    x = (STACK[:2].astype(np.float32)[:, None] / 65535).astype(np.float32)
    np.testing.assert_allclose(networks.models().decode(networks.models().encode(x)), x, atol=1e-5)


def test_training_starts_from_the_inner_layers_of_another_bundle(config: Config, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    other = max((ROOT / "models").glob("t1-[0-9]*"))
    torch.manual_seed(0)
    denoiser = build_denoiser(config)
    own = {name: w.clone() for name, w in denoiser.state_dict().items()}
    expected = matching_denoiser_weights(other, denoiser)
    load_start_weights(config, other.name, "denoiser", denoiser, steps=2)
    changed = [name for name, w in denoiser.state_dict().items() if not torch.equal(w, own[name])]
    assert {name for name in own if name not in changed} >= {"conv_in.conv.weight", "out.2.conv.weight"}
    assert len(changed) > 0.8 * len(own)
    torch.testing.assert_close(denoiser.state_dict(), expected)


def test_other_bundle_with_another_shape_is_refused(config: Config) -> None:
    narrow = config.model_copy(update={"denoiser": config.denoiser.model_copy(update={"channels": (32, 32, 64, 64)})})
    other = max((ROOT / "models").glob("t1-[0-9]*"))
    with pytest.raises(SystemExit, match="another shape"):
        matching_denoiser_weights(other, build_denoiser(narrow))


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_kind_of_latents(config: Config, *, both: bool) -> None:
    values = config.model_dump()
    whole = Config.load(ROOT / "training" / "configs" / "t1.toml").model_dump()
    values["vqvae"] = whole["vqvae"] if both else None
    values["pixel_latents"] = values["pixel_latents"] if both else None
    with pytest.raises(ValueError, match="give one of"):
        Config.model_validate(values)
