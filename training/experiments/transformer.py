"""The paper's opponent (Pinaya et al. 2021, arXiv 2102.11650): a transformer over the VQ-VAE's codes.

MONAI's `DecoderOnlyTransformer`, which has no cache: here its own layers are asked for some positions at a time,
with the keys and values of the earlier ones kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from monai.networks.nets.transformer import DecoderOnlyTransformer
from torch import nn
from torch.nn import functional as F


class Size(NamedTuple):
    """Of a transformer: the width of its embedding, its layers, and heads of each."""

    width: int
    depth: int
    heads: int


# 1.5 million parameters: on a CPU, of what an hour of one core can teach it, the larger ones learn less.
TRAINED = Size(128, 6, 4)
# Of King's College's published code (GitHub, Ashayp31/vqvae_transformer_anomaly_detection: experimentsC1/
# multi_cropped_vis/adaptive_vqvae/anomaly_detection/pet_challenge_data/ad_coordconv_spatial_cond_nembd_256.sh),
# whose attention is a linear approximation; here it is exact.
PUBLISHED = Size(256, 12, 8)
# Codes less likely than this quantile are drawn anew: of healthy slices' codes, or, untrained, of a slice's own.
QUANTILE = 0.025
# Its ensemble: the slice as it is and mirrored, each drawn so often.
DRAWS = 2
MEMBERS = 2 * DRAWS


def build_transformer(codes: int, length: int, size: Size = TRAINED) -> DecoderOnlyTransformer:
    """One that begins with a token of its own, the last one; untrained."""
    return DecoderOnlyTransformer(codes + 1, length, *size, use_flash_attention=True)


class Cached:
    """A transformer that is asked for the next code of a batch of sequences.

    Parameters
    ----------
    network : DecoderOnlyTransformer
    batch : int
    """

    def __init__(self, network: DecoderOnlyTransformer, batch: int) -> None:
        self._network = network
        width = network.attn_layers_dim // network.attn_layers_heads
        shape = (batch, network.attn_layers_heads, network.max_seq_len, width)
        where = network.to_logits.weight.device
        self._kept = [(torch.empty(shape, device=where), torch.empty(shape, device=where)) for _ in network.blocks]
        self._at = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of what follows the last of the next tokens (N, T), (N, codes)."""
        network, at = self._network, self._at
        end = self._at = at + tokens.shape[1]
        mask = _causal(at, end, tokens.device)
        x = network.token_embeddings(tokens) + network.position_embeddings.embedding.weight[at:end]  # (N, T, width)
        for block, (keys, values) in zip(network.blocks, self._kept, strict=True):
            y = block.norm1(x)
            keys[:, :, at:end] = self._by_head(block.attn.to_k(y))
            values[:, :, at:end] = self._by_head(block.attn.to_v(y))
            if block is network.blocks[-1]:  # what follows the other tokens is known
                x, y, mask = x[:, -1:], y[:, -1:], None
            q = self._by_head(block.attn.to_q(y))
            attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            x = x + block.attn.out_proj(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        logits: torch.Tensor = network.to_logits(x[:, -1])
        return logits

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, width) -> (N, heads, T, width of a head)."""
        return x.view(*x.shape[:2], self._network.attn_layers_heads, -1).transpose(1, 2)


def _causal(at: int, end: int, device: torch.device) -> torch.Tensor | None:
    """Which of the positions before `end` each one from `at` on sees; None where it is all of them."""
    if end == at + 1:
        return None
    return torch.ones(end - at, end, dtype=torch.bool, device=device).tril(at)


def shifted(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """What is known before each code of (N, L): the token of the beginning, then all but the last."""
    start = torch.full((len(codes), 1), network.num_tokens - 1, device=codes.device)
    return torch.cat([start, codes[:, :-1]], dim=1)


def log_likelihood(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """Of each code after those before it, (N, L)."""
    every = nn.functional.log_softmax(network(shifted(network, codes)), dim=-1)
    return every.gather(-1, codes[..., None])[..., 0]


def unlikely(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """The least likely codes of each slice, (N, L)."""
    likely = log_likelihood(network, codes)
    return likely <= likely.quantile(QUANTILE, dim=1, keepdim=True)


def uniforms(codes: torch.Tensor, seed: int) -> torch.Tensor:
    """A number from 0 to 1 for each code (N, L): what it is drawn by, whichever way."""
    drawn = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(codes.device)


def heal(network: DecoderOnlyTransformer, codes: torch.Tensor, anew: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Codes (N, L), some (N, L) drawn anew, each after all before it: one step for each position, all slices at once.

    Parameters
    ----------
    network : DecoderOnlyTransformer
    codes, anew : torch.Tensor
    by : torch.Tensor
        Of `uniforms`.
    """
    step, healed = Cached(network, len(codes)), codes.clone()
    token = shifted(network, codes)[:, :1]
    for at in range(codes.shape[1]):
        drawn = _draw(network, step(token), by[:, at])
        healed[:, at] = torch.where(anew[:, at], drawn, codes[:, at])
        token = healed[:, at : at + 1]
    return healed


def heal_known(
    network: DecoderOnlyTransformer, codes: torch.Tensor, anew: torch.Tensor, by: torch.Tensor
) -> torch.Tensor:
    """As `heal`, the same codes: a slice at a time, everything between two draws is known and fed at once."""
    healed = codes.clone()
    for one, chosen, chances in zip(healed, anew, by, strict=True):
        step, fed = Cached(network, 1), 0
        before = shifted(network, one[None])
        for at in chosen.nonzero()[:, 0].tolist():
            one[at : at + 1] = _draw(network, step(before[:, fed : at + 1]), chances[at : at + 1])
            fed = at + 1
            before[:, fed : fed + 1] = one[at]
    return healed


Heal = Callable[[DecoderOnlyTransformer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def heal_unlikely(
    network: DecoderOnlyTransformer,
    codes: torch.Tensor,
    threshold: float,
    by: torch.Tensor,
    batch: int,
    how: Heal = heal_known,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, L) of which those with a log-likelihood below the threshold are drawn anew, and which ones were.

    Parameters
    ----------
    network : DecoderOnlyTransformer
    codes : torch.Tensor
    threshold : float
    by : torch.Tensor
        Of `uniforms`.
    batch : int
        Slices at once.
    how : callable
        `heal` or `heal_known`.
    """
    anew = torch.cat([log_likelihood(network, part) < threshold for part in codes.split(16)])
    parts = zip(codes.split(batch), anew.split(batch), by.split(batch), strict=True)
    return torch.cat([how(network, *part) for part in parts]), anew


def positions_fed(anew: torch.Tensor) -> int:
    """How many positions `heal_known` evaluates: those up to the last draw of each slice."""
    return int((anew.flip(1).cumsum(1) > 0).sum())


def _draw(network: DecoderOnlyTransformer, logits: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Codes (N,) where the cumulative probability passes a number each; never the token that begins."""
    shares = logits[:, : network.num_tokens - 1].double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(shares, by[:, None] * shares[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=network.num_tokens - 2)
