"""Tests of packing, training and unpacking on another machine."""

import lzma
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training import accelerator, loop  # noqa: E402
from training import config as configuration  # noqa: E402
from training.config import ROOT, Config  # noqa: E402
from training.data import HealthySlices  # noqa: E402
from training.loop import load_modules  # noqa: E402
from training.networks import build_denoiser, build_vqvae  # noqa: E402

pytestmark = pytest.mark.training

CONFIGS = ROOT / "training" / "configs"
SHAPE = (24, 64, 64)


def small(config: Config, **update: object) -> Config:
    """Return the configuration with batches of two."""
    stages = {stage: getattr(config, stage).model_copy(update={"batch": 2, **update}) for stage in accelerator.STAGES}
    return config.model_copy(update=stages)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a folder of the test for runs, with a few random slices."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    stack = (np.random.default_rng(0).integers(0, 256, SHAPE) * 257).astype(np.uint16)
    monkeypatch.setattr(HealthySlices, "of", classmethod(lambda cls, _: cls(stack, stack[:4], "data")))
    monkeypatch.setattr("training.latents.STATISTICS_SLICES", 8)
    monkeypatch.setattr("training.latents.STATISTICS_BATCH", 4)
    monkeypatch.setattr("training.train_vqvae.VALIDATION_SLICES", 4)
    monkeypatch.setattr("training.train_denoiser.VALIDATION_SLICES", 4)
    return tmp_path


def test_weights_and_curves_are_restored(elsewhere: Path) -> None:
    config = small(Config.load(CONFIGS / "headct.toml"), warm_start="", steps=1)
    packed = accelerator.pack(config, elsewhere / "packed")
    healthy = accelerator.unpack_slices(accelerator.load_packed(lzma.decompress(packed.read_bytes())))
    np.testing.assert_array_equal(healthy.train, HealthySlices.of(config).train)
    accelerator.train(packed, elsewhere / "out", [0.5, 0.5], workers=0)
    remote = {stage: torch.load(config.run_folder / f"{stage}.pt", weights_only=True) for stage in accelerator.STAGES}
    for stage in accelerator.STAGES:
        (config.run_folder / f"{stage}.pt").unlink()
    (elsewhere / "configs").mkdir()
    # The committed configuration gets the numbers of steps.
    text = (CONFIGS / "headct.toml").read_text()
    for stage in accelerator.STAGES:
        values = {"batch": "2", "steps": str(remote[stage]["step"]), "warm_start": '""'}
        before, heading, section = text.partition(f"[{stage}]\n")
        for key, value in values.items():
            section = re.sub(rf"^{key} = .*$", f"{key} = {value}", section, count=1, flags=re.MULTILINE)
        text = before + heading + section
    (elsewhere / "configs" / "headct.toml").write_text(text)
    steps = accelerator.unpack((elsewhere / "out").iterdir(), elsewhere / "configs")
    assert steps == {stage: remote[stage]["step"] for stage in accelerator.STAGES}
    assert min(steps.values()) > 0
    trained = Config.load(elsewhere / "configs" / "headct.toml")
    averaged = torch.optim.swa_utils.AveragedModel(build_denoiser(trained))
    vqvae = build_vqvae(trained)
    assert load_modules(trained, "denoiser", {"averaged": averaged})["step"] == str(steps["denoiser"])
    load_modules(trained, "vqvae", {"vqvae": vqvae})
    for module, expected in (
        (averaged, remote["denoiser"]["modules"]["averaged"]),
        (vqvae, remote["vqvae"]["modules"]["vqvae"]),
    ):
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, expected[name]), name
    assert (trained.run_folder / "denoiser.csv").read_text().count("\n") >= 2


def test_unpack_refuses_another_configuration(elsewhere: Path) -> None:
    config = small(Config.load(CONFIGS / "headct.toml"), warm_start="", steps=1)
    accelerator.train(accelerator.pack(config, elsewhere), elsewhere / "out", [0.1, 0.1], workers=0)
    with pytest.raises(SystemExit, match="packed configuration"):
        accelerator.unpack((elsewhere / "out").iterdir(), CONFIGS)


def test_stage_starts_from_packed_weights(elsewhere: Path) -> None:
    """The other machine has no scans, no runs and no bundles."""
    config = small(Config.load(CONFIGS / "t1.toml"), steps=1)
    earlier = config.model_copy(update={"version": config.denoiser.warm_start})
    earlier.run_folder.mkdir(parents=True)
    for stage, module in (("vqvae", build_vqvae(config)), ("denoiser", build_denoiser(config))):
        torch.save({"modules": {stage: module.state_dict()}}, earlier.run_folder / f"{stage}.pt")
    packed = accelerator.load_packed(lzma.decompress(accelerator.pack(config, elsewhere).read_bytes()))
    assert {w.dtype for w in packed["start"]["denoiser"].values()} == {torch.float16}
    for stage in accelerator.STAGES:
        (earlier.run_folder / f"{stage}.pt").unlink()
        accelerator.save_start_weights(config, stage, packed["start"][stage])
    denoiser = build_denoiser(config)
    loop.load_start_weights(config, config.denoiser.warm_start, "denoiser", denoiser, steps=1)
    for name, weight in denoiser.state_dict().items():
        torch.testing.assert_close(weight.half(), packed["start"]["denoiser"][name])
