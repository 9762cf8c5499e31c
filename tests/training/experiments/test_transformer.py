"""The cache changes nothing, nor does feeding what is known at once: logits are those of MONAI's whole forward pass."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from monai.networks.nets.transformer import DecoderOnlyTransformer  # noqa: E402
from torch import Tensor  # noqa: E402

from app.pipeline.residual import upsample  # noqa: E402
from training.experiments.healing import WHOLE, WITHIN, Transformer, drawn_in  # noqa: E402
from training.experiments.methods import DIFFERENCE  # noqa: E402
from training.experiments.transformer import (  # noqa: E402
    QUANTILE,
    Cached,
    heal,
    heal_known,
    log_likelihood,
    positions_fed,
    uniforms,
    unlikely,
)

if TYPE_CHECKING:
    from training.experiments.cases import Case
    from training.restore import TorchNetworks

pytestmark = pytest.mark.training

CODES, LENGTH, BATCH = 11, 40, 3


@pytest.fixture(scope="module")
def network() -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    made = DecoderOnlyTransformer(CODES + 1, LENGTH, 16, 2, 4, use_flash_attention=True)
    return made.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def codes() -> Tensor:
    made: Tensor = torch.randint(0, CODES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return made


@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (LENGTH,), (7, 1, 1, 30, 1), (1, 39)])
def test_chunks_are_the_whole_pass(network: DecoderOnlyTransformer, codes: Tensor, sizes: tuple[int]) -> None:
    step = Cached(network, BATCH)
    found = torch.stack([step(chunk) for chunk in codes.split(sizes, dim=1)], dim=1)
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(found, network(codes)[:, ends], atol=1e-5, rtol=1e-5)


def test_only_unlikely_codes_are_drawn_anew(network: DecoderOnlyTransformer, codes: Tensor) -> None:
    anew = unlikely(network, codes)
    healed = heal(network, codes, anew, uniforms(codes, 3))
    assert int(healed.max()) < CODES  # never the token that begins
    assert int(anew.sum()) <= BATCH * (1 + int(QUANTILE * LENGTH))
    assert torch.equal(healed[~anew], codes[~anew])
    assert torch.equal(healed, heal(network, codes, anew, uniforms(codes, 3)))


@pytest.mark.parametrize("share", [0.0, 0.025, 0.3, 1.0])
def test_known_codes_at_once_draw_the_same(network: DecoderOnlyTransformer, codes: Tensor, share: float) -> None:
    likely = log_likelihood(network, codes)
    anew = likely < likely.quantile(share) if share < 1 else torch.ones_like(codes, dtype=torch.bool)
    before = codes.clone()
    found = heal_known(network, codes, anew, uniforms(codes, 5))
    assert torch.equal(found, heal(network, codes, anew, uniforms(codes, 5)))
    assert torch.equal(codes, before)
    assert torch.equal(found, codes) == (share == 0)


@pytest.mark.parametrize("at", [0, LENGTH - 1])
def test_first_and_last_position(network: DecoderOnlyTransformer, codes: Tensor, at: int) -> None:
    anew = torch.zeros_like(codes, dtype=torch.bool)
    anew[:, at] = True
    for seed in range(4):
        by = uniforms(codes, seed)
        assert torch.equal(heal_known(network, codes, anew, by), heal(network, codes, anew, by))
    assert positions_fed(anew) == BATCH * (at + 1)
    assert positions_fed(torch.zeros_like(anew)) == 0


def test_codes_are_drawn_as_often_as_they_are_likely(network: DecoderOnlyTransformer) -> None:
    many = torch.zeros(4000, LENGTH, dtype=torch.int64)
    first = torch.zeros_like(many[:, :1], dtype=torch.bool).expand(-1, LENGTH).clone()
    first[:, 0] = True
    drawn = heal_known(network, many, first, uniforms(many, 0))[:, 0]
    start = torch.full((1, 1), CODES)
    expected = network(start)[0, 0, :CODES].softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=CODES) / len(many), expected, atol=0.03)


def test_processes_side_by_side_draw_the_same(network: DecoderOnlyTransformer, codes: Tensor) -> None:
    by = uniforms(codes, 5)
    draw = partial(drawn_in, network, float(log_likelihood(network, codes).quantile(0.3)))
    # One after the other: what is sent to a process moves to shared memory, under whoever is reading it here.
    alone = list(map(draw, codes.split(2), by.split(2)))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        elsewhere = list(pool.map(draw, codes.split(2), by.split(2)))
    for here, there in zip(alone, elsewhere, strict=True):
        assert 0 < int(here[1].sum()) < here[1].numel()
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_masked_map_is_the_other_one_where_codes_were_drawn_anew(
    network: DecoderOnlyTransformer, *, mirrored: bool
) -> None:
    rows, columns, side = 5, 8, 4
    bins = torch.arange(CODES) / CODES
    decoder = SimpleNamespace(
        nearest=lambda z: (z[:, 0, ::side, ::side] * CODES).long().clamp(max=CODES - 1),
        decode_codes=lambda k: bins[k][:, None].repeat_interleave(side, 2).repeat_interleave(side, 3),
    )
    made = Transformer(cast("TorchNetworks", SimpleNamespace(encoder=lambda x: x, decoder=decoder)), network, seed=1)
    x = np.random.default_rng(3).random((2, 1, rows * side, columns * side), dtype=np.float32)
    case = cast("Case", SimpleNamespace(x=x))
    everywhere, within = f"{DIFFERENCE}, {WHOLE}", f"{DIFFERENCE}, {WITHIN}"
    nothing = made.residuals(case, 1, mirrored=mirrored)
    assert not nothing[within].any()
    assert nothing[everywhere].any(), "what the codes cannot show is there all the same"
    # The least likely half of the codes, drawn once.
    made.threshold = float(made.likelihood(torch.from_numpy(x)).median())
    some = made.residuals(case, 1, mirrored=mirrored)
    expected = {everywhere: np.zeros_like(x[:, 0]), within: np.zeros_like(x[:, 0])}
    ways = (False, True) if mirrored else (False,)
    for flip in ways:
        seen = np.ascontiguousarray(x[..., ::-1]) if flip else x
        healed, anew = made._healed(torch.from_numpy(seen), 0)
        assert 0 < int(anew.sum()) < anew.numel()
        off = np.abs(seen - healed.numpy())[:, 0]
        for name, values in ((everywhere, off), (within, off * upsample(anew.numpy(), off.shape[1:]))):
            expected[name] += (values[..., ::-1] if flip else values) / len(ways)
    for name, values in expected.items():
        np.testing.assert_allclose(some[name], values, atol=1e-6)
