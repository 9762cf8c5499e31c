"""Autoregressive transformer over VQ-VAE codes (Pinaya et al. 2021, arXiv 2102.11650).

The network is MONAI's `DecoderOnlyTransformer`, which has no key-value cache. `CachedTransformer` runs its layers
with one.
"""

from typing import NamedTuple

import torch
from monai.networks.nets.transformer import DecoderOnlyTransformer
from torch import nn
from torch.nn import functional as F


class Size(NamedTuple):
    """Embedding width, layers, and heads of each layer."""

    width: int
    depth: int
    heads: int


# 1.5 million parameters: in an hour of one CPU core, larger ones reach a worse loss.
TRAINED = Size(128, 6, 4)
# Of the authors' published code (GitHub, Ashayp31/vqvae_transformer_anomaly_detection: experimentsC1/
# multi_cropped_vis/adaptive_vqvae/anomaly_detection/pet_challenge_data/ad_coordconv_spatial_cond_nembd_256.sh).
# Its attention is a linear approximation. Here it is exact.
PUBLISHED = Size(256, 12, 8)
# Codes below this quantile of the log-likelihood of healthy slices are resampled.
QUANTILE = 0.025
# The ensemble resamples a slice and its mirror image so often each.
DRAWS = 2
MEMBERS = 2 * DRAWS


def build_transformer(codes: int, length: int, size: Size = TRAINED) -> DecoderOnlyTransformer:
    """Build an untrained transformer. Its last token marks the beginning of a sequence."""
    return DecoderOnlyTransformer(codes + 1, length, *size, use_flash_attention=True)


class CachedTransformer:
    """Transformer that is fed a batch of sequences piece by piece, with a key-value cache."""

    def __init__(self, network: DecoderOnlyTransformer, batch: int) -> None:
        self._network = network
        width = network.attn_layers_dim // network.attn_layers_heads
        shape = (batch, network.attn_layers_heads, network.max_seq_len, width)
        where = network.to_logits.weight.device
        self._cache = [(torch.empty(shape, device=where), torch.empty(shape, device=where)) for _ in network.blocks]
        self._position = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed the next tokens (N, T) and return the logits after the last one, (N, codes)."""
        network, start = self._network, self._position
        end = self._position = start + tokens.shape[1]
        mask = _causal_mask(start, end, tokens.device)
        x = network.token_embeddings(tokens) + network.position_embeddings.embedding.weight[start:end]  # (N, T, width)
        for block, (keys, values) in zip(network.blocks, self._cache, strict=True):
            y = block.norm1(x)
            keys[:, :, start:end] = self._split_heads(block.attn.to_k(y))
            values[:, :, start:end] = self._split_heads(block.attn.to_v(y))
            if block is network.blocks[-1]:  # only the last token's logits are needed
                x, y, mask = x[:, -1:], y[:, -1:], None
            q = self._split_heads(block.attn.to_q(y))
            attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            x = x + block.attn.out_proj(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        logits: torch.Tensor = network.to_logits(x[:, -1])
        return logits

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape (N, T, width) to (N, heads, T, width of a head)."""
        return x.view(*x.shape[:2], self._network.attn_layers_heads, -1).transpose(1, 2)


def _causal_mask(start: int, end: int, device: torch.device) -> torch.Tensor | None:
    """Return which positions before `end` each position from `start` on attends to; None for a single position."""
    if end == start + 1:
        return None
    return torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)


def shift_right(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """Return the inputs that predict codes (N, L): the beginning token, then all codes but the last."""
    begin = torch.full((len(codes), 1), network.num_tokens - 1, device=codes.device)
    return torch.cat([begin, codes[:, :-1]], dim=1)


def log_likelihood(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of each code given the codes before it, (N, L)."""
    every = nn.functional.log_softmax(network(shift_right(network, codes)), dim=-1)
    return every.gather(-1, codes[..., None])[..., 0]


def least_likely(network: DecoderOnlyTransformer, codes: torch.Tensor) -> torch.Tensor:
    """Return which codes are in the lowest quantile of their own slice, (N, L)."""
    likelihood = log_likelihood(network, codes)
    return likelihood <= likelihood.quantile(QUANTILE, dim=1, keepdim=True)


def uniform_draws(codes: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw the number in [0, 1) that each code (N, L) is sampled by."""
    drawn = torch.rand(codes.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(codes.device)


def resample_stepwise(
    network: DecoderOnlyTransformer, codes: torch.Tensor, chosen: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Resample the chosen codes (N, L) given all codes before them, one position at a time for all slices.

    Parameters
    ----------
    chosen : torch.Tensor
        (N, L) of bool.
    draws : torch.Tensor
        Draws, as returned by `uniform_draws`.
    """
    step, resampled = CachedTransformer(network, len(codes)), codes.clone()
    token = shift_right(network, codes)[:, :1]
    for at in range(codes.shape[1]):
        drawn = _sample(network, step(token), draws[:, at])
        resampled[:, at] = torch.where(chosen[:, at], drawn, codes[:, at])
        token = resampled[:, at : at + 1]
    return resampled


def resample(
    network: DecoderOnlyTransformer, codes: torch.Tensor, chosen: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Do the same as `resample_stepwise`, faster on a CPU, because the codes between two draws are fed together."""
    resampled = codes.clone()
    for one, own, numbers in zip(resampled, chosen, draws, strict=True):
        step, fed = CachedTransformer(network, 1), 0
        before = shift_right(network, one[None])
        for at in own.nonzero()[:, 0].tolist():
            one[at : at + 1] = _sample(network, step(before[:, fed : at + 1]), numbers[at : at + 1])
            fed = at + 1
            before[:, fed : fed + 1] = one[at]
    return resampled


def count_fed_positions(chosen: torch.Tensor) -> int:
    """Return how many positions `resample` evaluates: those up to the last draw of each slice."""
    return int((chosen.flip(1).cumsum(1) > 0).sum())


def _sample(network: DecoderOnlyTransformer, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Sample codes (N,) by inverting the cumulative probability. The beginning token is never sampled."""
    cumulative = logits[:, : network.num_tokens - 1].double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=network.num_tokens - 2)
