"""The key-value cache and resampling against MONAI's whole forward pass."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from monai.networks.nets.transformer import DecoderOnlyTransformer  # noqa: E402
from torch import Tensor  # noqa: E402

from app.pipeline.scores import upsample  # noqa: E402
from training.experiments.baselines import DIFFERENCE  # noqa: E402
from training.experiments.resampling import EVERYWHERE, RESAMPLED_ONLY, CodeResampler  # noqa: E402
from training.experiments.transformer import (  # noqa: E402
    QUANTILE,
    CachedTransformer,
    count_fed_positions,
    least_likely,
    log_likelihood,
    resample,
    resample_stepwise,
    uniform_draws,
)

if TYPE_CHECKING:
    from training.experiments.cases import Case
    from training.networks import TorchNetworks

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
def test_chunks_give_the_logits_of_the_whole_pass(
    network: DecoderOnlyTransformer, codes: Tensor, sizes: tuple[int]
) -> None:
    step = CachedTransformer(network, BATCH)
    found = torch.stack([step(chunk) for chunk in codes.split(sizes, dim=1)], dim=1)
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(found, network(codes)[:, ends], atol=1e-5, rtol=1e-5)


def test_only_unlikely_codes_are_resampled(network: DecoderOnlyTransformer, codes: Tensor) -> None:
    chosen = least_likely(network, codes)
    resampled = resample_stepwise(network, codes, chosen, uniform_draws(codes, 3))
    assert int(resampled.max()) < CODES  # never the beginning token
    assert int(chosen.sum()) <= BATCH * (1 + int(QUANTILE * LENGTH))
    assert torch.equal(resampled[~chosen], codes[~chosen])
    assert torch.equal(resampled, resample_stepwise(network, codes, chosen, uniform_draws(codes, 3)))


@pytest.mark.parametrize("share", [0.0, 0.025, 0.3, 1.0])
def test_chunked_resampling_equals_stepwise(network: DecoderOnlyTransformer, codes: Tensor, share: float) -> None:
    likely = log_likelihood(network, codes)
    chosen = likely < likely.quantile(share) if share < 1 else torch.ones_like(codes, dtype=torch.bool)
    before = codes.clone()
    found = resample(network, codes, chosen, uniform_draws(codes, 5))
    assert torch.equal(found, resample_stepwise(network, codes, chosen, uniform_draws(codes, 5)))
    assert torch.equal(codes, before)
    assert torch.equal(found, codes) == (share == 0)


@pytest.mark.parametrize("at", [0, LENGTH - 1])
def test_first_and_last_position_are_resampled(network: DecoderOnlyTransformer, codes: Tensor, at: int) -> None:
    chosen = torch.zeros_like(codes, dtype=torch.bool)
    chosen[:, at] = True
    for seed in range(4):
        by = uniform_draws(codes, seed)
        assert torch.equal(resample(network, codes, chosen, by), resample_stepwise(network, codes, chosen, by))
    assert count_fed_positions(chosen) == BATCH * (at + 1)
    assert count_fed_positions(torch.zeros_like(chosen)) == 0


def test_codes_are_sampled_by_their_probability(network: DecoderOnlyTransformer) -> None:
    many = torch.zeros(4000, LENGTH, dtype=torch.int64)
    first = torch.zeros_like(many[:, :1], dtype=torch.bool).expand(-1, LENGTH).clone()
    first[:, 0] = True
    drawn = resample(network, many, first, uniform_draws(many, 0))[:, 0]
    start = torch.full((1, 1), CODES)
    expected = network(start)[0, 0, :CODES].softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=CODES) / len(many), expected, atol=0.03)


@pytest.mark.parametrize("mirrored", [False, True])
def test_masked_map_is_the_difference_at_resampled_codes(network: DecoderOnlyTransformer, *, mirrored: bool) -> None:
    rows, columns, side = 5, 8, 4
    bins = torch.arange(CODES) / CODES
    decoder = SimpleNamespace(
        nearest=lambda z: (z[:, 0, ::side, ::side] * CODES).long().clamp(max=CODES - 1),
        decode_codes=lambda k: bins[k][:, None].repeat_interleave(side, 2).repeat_interleave(side, 3),
    )
    vqvae = cast("TorchNetworks", SimpleNamespace(encoder=lambda x: x, code_decoder=decoder))
    x = np.random.default_rng(3).random((2, 1, rows * side, columns * side), dtype=np.float32)
    case = cast("Case", SimpleNamespace(x=x))
    resampler = CodeResampler(vqvae, network, seed=1)
    everywhere, within = f"{DIFFERENCE}, {EVERYWHERE}", f"{DIFFERENCE}, {RESAMPLED_ONLY}"
    nothing = resampler.residuals(case, 1, mirrored=mirrored)
    assert not nothing[within].any()
    assert nothing[everywhere].any()  # the error of the autoencoder
    codes = resampler.encode(torch.from_numpy(x))
    resampler.threshold = float(resampler.log_likelihood(codes).median())
    found = resampler.residuals(case, 1, mirrored=mirrored)
    expected = {everywhere: np.zeros_like(x[:, 0]), within: np.zeros_like(x[:, 0])}
    directions = (False, True) if mirrored else (False,)
    for flip in directions:
        shown = np.ascontiguousarray(x[..., ::-1]) if flip else x
        codes = resampler.encode(torch.from_numpy(shown))
        chosen = resampler.log_likelihood(codes) < resampler.threshold
        assert 0 < int(chosen.sum()) < chosen.numel()
        difference = np.abs(shown - resampler.resample(codes, chosen, 0).numpy())[:, 0]
        masked = difference * upsample(chosen.numpy(), difference.shape[1:])
        for name, values in ((everywhere, difference), (within, masked)):
            expected[name] += (values[..., ::-1] if flip else values) / len(directions)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def test_processes_draw_the_same(network: DecoderOnlyTransformer, codes: Tensor) -> None:
    decoder = SimpleNamespace(decode_codes=lambda k: k[:, None])
    vqvae = cast("TorchNetworks", SimpleNamespace(encoder=lambda x: x, code_decoder=decoder))
    many = codes.repeat(2, 1).view(6, 5, 8)
    chosen = torch.rand(many.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    alone = CodeResampler(vqvae, network, seed=5).resample(many, chosen, 1)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parallel = CodeResampler(vqvae, network, 5, pool.map).resample(many, chosen, 1)
    assert torch.equal(alone, parallel)
    assert torch.equal(alone[:, 0][~chosen], many[~chosen])
