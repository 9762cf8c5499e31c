"""A transformer that learnt elsewhere comes back with what it drew, or alone where the lease ended before."""

import lzma
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training import config as configuration  # noqa: E402
from training.accelerator import packed_slices  # noqa: E402
from training.config import ROOT, Config  # noqa: E402
from training.data import HealthySlices  # noqa: E402
from training.experiments import accelerator, opponents, transformer  # noqa: E402
from training.experiments.healed import Healed, drawing, healed_path  # noqa: E402
from training.networks import build_vqvae  # noqa: E402

pytestmark = pytest.mark.training

CONFIG = Config.load(ROOT / "training" / "configs" / "headct.toml")
SHORT = replace(opponents.OPPONENTS["transformer"], steps=1, batch=2)
CODES = torch.randint(CONFIG.vqvae.codes, (2, 32 * 32), generator=torch.Generator().manual_seed(0)).to(torch.int16)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two slices to draw in, seen both ways round, and an autoencoder that learnt nothing."""
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    monkeypatch.setattr(accelerator, "opponent_of", lambda *_: SHORT)
    for module in (accelerator, opponents):
        monkeypatch.setattr(module, "data_hash", lambda *_: "data")
    stack = (np.random.default_rng(0).integers(0, 256, (4, 64, 64)) * 257).astype(np.uint16)
    monkeypatch.setattr(HealthySlices, "of", classmethod(lambda cls, _: cls(stack, stack, "data")))
    vqvae = build_vqvae(CONFIG)
    content = {
        **packed_slices(CONFIG),
        "opponent": repr(SHORT),
        "encoder": vqvae.encoder.state_dict(),
        "codes": vqvae.quantizer.quantizer.embedding.weight.detach(),
        "healthy": [CODES],
        "cases": [CODES, CODES.flip(1)],
    }
    path = tmp_path / "headct.opponent.xz"
    with lzma.open(path, "wb", preset=0) as file:
        torch.save(content, file)
    return path


def test_it_comes_back_with_its_draws(packed: Path, tmp_path: Path) -> None:
    accelerator.learn(packed, tmp_path / "out", workers=0)
    (CONFIG.run_folder / "opponent-transformer.pt").unlink()
    accelerator.unpack(tmp_path / "out" / "headct.opponent")
    network = opponents.load(SHORT, CONFIG)
    codes = CODES.long()
    with torch.inference_mode():
        likely = transformer.log_likelihood(network, codes)
    threshold = float(np.quantile(likely.numpy(), transformer.QUANTILE))
    kept = Healed.load(healed_path(CONFIG))
    for seen in (codes, codes.flip(1)):
        for own in range(transformer.DRAWS):
            name = drawing(network, threshold, CONFIG.seed + own)
            assert not len(kept.lacking(seen, name))
            healed, anew = kept.find(seen, name)
            assert anew.any()
            assert torch.equal(healed[~anew], seen[~anew])


def test_it_comes_back_alone_where_the_lease_ends_before_its_draws(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> Iterator[Healed]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(accelerator, "draws", ended)
    with pytest.raises(KeyboardInterrupt):
        accelerator.learn(packed, tmp_path / "out", workers=0)
    accelerator.unpack(tmp_path / "out" / "headct.opponent")
    assert not opponents.load(SHORT, CONFIG).training
    assert not healed_path(CONFIG).exists()


def test_another_bundle_or_budget_is_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "opponent_of", lambda *_: replace(SHORT, steps=2))
    with pytest.raises(SystemExit, match="pack it again for headct"):
        accelerator.learn(packed, tmp_path / "out", workers=0)
