"""What is learnt on a machine that is lent comes back as if it had been learnt here."""

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
    """Batches of two."""
    stages = {stage: getattr(config, stage).model_copy(update={"batch": 2, **update}) for stage in accelerator.STAGES}
    return config.model_copy(update=stages)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in a folder of the test, slices that are made, few of them to look at."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    stack = (np.random.default_rng(0).integers(0, 256, SHAPE) * 257).astype(np.uint16)
    monkeypatch.setattr(HealthySlices, "of", classmethod(lambda cls, _: cls(stack, stack[:4], "data")))
    monkeypatch.setattr("training.latents.STATISTICS_SLICES", 8)
    monkeypatch.setattr("training.latents.BATCH", 4)
    monkeypatch.setattr("training.train_vqvae.VALIDATION_SLICES", 4)
    monkeypatch.setattr("training.train_denoiser.VALIDATION_SLICES", 4)
    return tmp_path


def test_weights_and_curves_come_back(elsewhere: Path) -> None:
    config = small(Config.load(CONFIGS / "headct.toml"), warm_start="", steps=1)
    packed = accelerator.pack(config, elsewhere / "packed")
    healthy = accelerator.healthy_of(accelerator.read_packed(lzma.decompress(packed.read_bytes())))
    np.testing.assert_array_equal(healthy.train, HealthySlices.of(config).train)
    accelerator.learn(packed, elsewhere / "out", [0.5, 0.5], workers=0)
    there = {stage: torch.load(config.run_folder / f"{stage}.pt", weights_only=True) for stage in accelerator.STAGES}
    for stage in accelerator.STAGES:
        (config.run_folder / f"{stage}.pt").unlink()
    (elsewhere / "configs").mkdir()
    # The configuration is written down with the steps that were learnt.
    text = (CONFIGS / "headct.toml").read_text()
    for stage in accelerator.STAGES:
        learnt_here = {"batch": "2", "steps": str(there[stage]["step"]), "warm_start": '""'}
        before, heading, section = text.partition(f"[{stage}]\n")
        for key, value in learnt_here.items():
            section = re.sub(rf"^{key} = .*$", f"{key} = {value}", section, count=1, flags=re.MULTILINE)
        text = before + heading + section
    (elsewhere / "configs" / "headct.toml").write_text(text)
    steps = accelerator.unpack((elsewhere / "out").iterdir(), elsewhere / "configs")
    assert steps == {stage: there[stage]["step"] for stage in accelerator.STAGES}
    assert min(steps.values()) > 0
    learnt = Config.load(elsewhere / "configs" / "headct.toml")
    averaged = torch.optim.swa_utils.AveragedModel(build_denoiser(learnt))
    vqvae = build_vqvae(learnt)
    assert load_modules(learnt, "denoiser", {"averaged": averaged})["step"] == str(steps["denoiser"])
    load_modules(learnt, "vqvae", {"vqvae": vqvae})
    for mine, theirs in (
        (averaged, there["denoiser"]["modules"]["averaged"]),
        (vqvae, there["vqvae"]["modules"]["vqvae"]),
    ):
        for name, weight in mine.state_dict().items():
            assert torch.equal(weight, theirs[name]), name
    assert (learnt.run_folder / "denoiser.csv").read_text().count("\n") >= 2


def test_another_configuration_than_the_one_that_learnt_is_refused(elsewhere: Path) -> None:
    config = small(Config.load(CONFIGS / "headct.toml"), warm_start="", steps=1)
    accelerator.learn(accelerator.pack(config, elsewhere), elsewhere / "out", [0.1, 0.1], workers=0)
    with pytest.raises(SystemExit, match="must be what learnt, with the steps"):
        accelerator.unpack((elsewhere / "out").iterdir(), CONFIGS)


def test_a_stage_goes_on_from_the_version_that_it_names(elsewhere: Path) -> None:
    """Without the scans, the runs and the bundles of the machine that packs."""
    config = small(Config.load(CONFIGS / "t1.toml"), steps=1)
    earlier = config.model_copy(update={"version": config.denoiser.warm_start})
    earlier.run_folder.mkdir(parents=True)
    for stage, module in (("vqvae", build_vqvae(config)), ("denoiser", build_denoiser(config))):
        torch.save({"modules": {stage: module.state_dict()}}, earlier.run_folder / f"{stage}.pt")
    packed = accelerator.read_packed(lzma.decompress(accelerator.pack(config, elsewhere).read_bytes()))
    assert {w.dtype for w in packed["start"]["denoiser"].values()} == {torch.float16}
    for stage in accelerator.STAGES:
        (earlier.run_folder / f"{stage}.pt").unlink()
        accelerator.as_earlier(config, stage, packed["start"][stage])
    denoiser = build_denoiser(config)
    loop.start_from(config, config.denoiser.warm_start, "denoiser", denoiser, steps=1)
    for name, weight in denoiser.state_dict().items():
        torch.testing.assert_close(weight.half(), packed["start"]["denoiser"][name])
