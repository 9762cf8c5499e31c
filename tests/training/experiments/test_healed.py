"""What was drawn is found again for the same codes and numbers, slice by slice, and nothing else is."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training.experiments import accelerator, transformer  # noqa: E402
from training.experiments.healed import Healed, drawing  # noqa: E402
from training.experiments.healing import Transformer  # noqa: E402

if TYPE_CHECKING:
    from training.experiments.cases import Case
    from training.restore import TorchNetworks

pytestmark = pytest.mark.training

CODES = torch.randint(16, (5, 24), generator=torch.Generator().manual_seed(1))
ANEW = torch.rand(5, 24, generator=torch.Generator().manual_seed(2)) < 0.2
ANEW[3] = False
DRAWN = torch.where(ANEW, (CODES + 1) % 16, CODES)


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    path = tmp_path / "healed.npz"
    kept = Healed.load(path)
    assert kept.lacking(CODES, "7").tolist() == [0, 1, 2, 3, 4]
    some = torch.tensor([0, 2, 3, 4])
    kept.add(CODES, some, "7", (DRAWN[some], ANEW[some]))
    again = Healed.load(path)
    assert again.lacking(CODES, "7").tolist() == [1]
    again.add(CODES, torch.tensor([1]), "7", (DRAWN[1:2], ANEW[1:2]))
    healed, anew = Healed.load(path).find(CODES, "7")
    assert torch.equal(healed, DRAWN)
    assert torch.equal(anew, ANEW)


def test_other_numbers_and_another_place_are_other_draws() -> None:
    kept = Healed()
    kept.add(CODES, torch.arange(5), "7", (DRAWN, ANEW))
    assert kept.lacking(CODES, "8").tolist() == [0, 1, 2, 3, 4]
    assert kept.lacking(CODES.flip(0), "7").tolist() == [0, 1, 3, 4]  # the middle one stayed


def test_a_slice_is_drawn_by_the_same_numbers_with_and_without_the_others_after_it() -> None:
    """Of a case that lacks some slices, those alone are drawn."""
    assert torch.equal(transformer.uniforms(CODES, 7)[:2], transformer.uniforms(CODES[:2], 7))


def test_drawing_some_slices_gives_what_drawing_all_gives() -> None:
    torch.manual_seed(3)
    network = transformer.build_transformer(16, 24, transformer.Size(16, 2, 2)).eval()
    by = transformer.uniforms(CODES, 7)
    with torch.inference_mode():
        whole, anew = transformer.heal_unlikely(network, CODES, -2.7, by, 2)
        some, _ = transformer.heal_unlikely(network, CODES[3:], -2.7, by[3:], 16, transformer.heal)
    assert anew.any()
    assert torch.equal(whole[3:], some)
    assert torch.equal(whole == CODES, torch.where(anew, whole == CODES, True))


def test_another_network_or_threshold_is_another_drawing() -> None:
    torch.manual_seed(4)
    one, other = (transformer.build_transformer(16, 24, transformer.Size(16, 2, 2)) for _ in range(2))
    names = {drawing(one, -2.7, 1), drawing(other, -2.7, 1), drawing(one, -2.8, 1), drawing(one, -2.7, 2)}
    assert len(names) == 4
    assert drawing(one, -2.70001, 1) in names


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_an_accelerator_drew_is_all_that_the_maps_need(tmp_path: Path, *, mirrored: bool) -> None:
    """Packed both ways round, drawn step by step in one batch, found by the method that would draw it otherwise."""
    torch.manual_seed(5)
    network = transformer.build_transformer(16, 24, transformer.Size(16, 2, 2)).eval()
    bins = torch.arange(16) / 16
    vqvae = SimpleNamespace(
        encoder=lambda x: x,
        decoder=SimpleNamespace(nearest=lambda z: (z[:, 0] * 16).long(), decode_codes=lambda k: bins[k][:, None]),
    )
    x = np.random.default_rng(6).random((3, 1, 4, 6), dtype=np.float32)
    case = cast("Case", SimpleNamespace(x=x))
    fresh = Transformer(cast("TorchNetworks", vqvae), network, seed=9)
    fresh.calibrate([x])
    codes = accelerator.codes_both_ways(fresh, case)
    *_, drawn = accelerator.draws(network, {"healthy": codes[:1], "cases": codes}, seed=9)
    path = tmp_path / "healed.npz"
    drawn.save(path)
    made = Transformer(cast("TorchNetworks", vqvae), network, 9, Healed.load(path))
    made.calibrate([x])
    before = len(made.known.drawn)
    expected = fresh.residuals(case, transformer.DRAWS, mirrored=mirrored)
    for name, values in made.residuals(case, transformer.DRAWS, mirrored=mirrored).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)
    assert len(made.known.drawn) == before, "nothing had to be drawn"
    assert before == 2 * len(x) * transformer.DRAWS
