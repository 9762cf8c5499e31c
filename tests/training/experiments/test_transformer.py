"""The cache changes nothing: position by position, the logits are those of MONAI's whole forward pass."""

import pytest

torch = pytest.importorskip("torch")

from monai.networks.nets.transformer import DecoderOnlyTransformer  # noqa: E402

from training.experiments.transformer import QUANTILE, Cached, heal, unlikely  # noqa: E402

pytestmark = pytest.mark.training

CODES, LENGTH, BATCH = 11, 40, 3


@pytest.fixture(scope="module")
def network() -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    made = DecoderOnlyTransformer(CODES + 1, LENGTH, 16, 2, 4, use_flash_attention=True)
    return made.eval().requires_grad_(requires_grad=False)


def test_cached_steps_are_the_whole_pass(network: DecoderOnlyTransformer) -> None:
    tokens = torch.randint(0, CODES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    step = Cached(network, BATCH)
    found = torch.stack([step(tokens[:, at]) for at in range(LENGTH)], dim=1)
    torch.testing.assert_close(found, network(tokens), atol=1e-5, rtol=1e-5)


def test_only_unlikely_codes_are_drawn_anew(network: DecoderOnlyTransformer) -> None:
    codes = torch.randint(0, CODES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    anew = unlikely(network, codes)
    healed = heal(network, codes, anew, torch.Generator().manual_seed(3))
    assert int(healed.max()) < CODES  # never the token that begins
    assert int(anew.sum()) <= BATCH * (1 + int(QUANTILE * LENGTH))
    assert torch.equal(healed[~anew], codes[~anew])
    again = heal(network, codes, anew, torch.Generator().manual_seed(3))
    assert torch.equal(healed, again)
