"""The paper's opponent (Pinaya et al. 2021, arXiv 2102.11650): a transformer over the VQ-VAE's codes.

MONAI's `DecoderOnlyTransformer`, which has no cache: here its own layers are asked for one position at a time,
with the keys and values of the earlier ones kept.
"""

import torch
from monai.networks.nets.transformer import DecoderOnlyTransformer
from torch import nn
from torch.nn import functional as F

# 1.5 million parameters: of what an hour of one core can teach it, the larger ones learn less.
WIDTH, DEPTH, HEADS = 128, 6, 4
# Codes less likely than this quantile of a slice's are imagined anew.
QUANTILE = 0.005
# Its ensemble: the slice as it is and mirrored, each drawn so often.
DRAWS = 2
MEMBERS = 2 * DRAWS


def build_transformer(codes: int, length: int) -> DecoderOnlyTransformer:
    """One that begins with a token of its own, the last one; untrained."""
    return DecoderOnlyTransformer(codes + 1, length, WIDTH, DEPTH, HEADS, use_flash_attention=True)


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
        self._kept = [(torch.empty(shape), torch.empty(shape)) for _ in network.blocks]
        self._at = 0

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Logits of what follows a token (N,), (N, codes)."""
        network, at = self._network, self._at
        x = network.token_embeddings(token) + network.position_embeddings.embedding.weight[at]  # (N, width)
        for block, (keys, values) in zip(network.blocks, self._kept, strict=True):
            y = block.norm1(x)
            q, keys[:, :, at], values[:, :, at] = (
                layer(y).view(len(x), network.attn_layers_heads, -1)
                for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
            )
            seen = slice(0, at + 1)
            attended = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, seen], values[:, :, seen])
            x = x + block.attn.out_proj(attended.reshape(len(x), -1))
            x = x + block.mlp(block.norm2(x))
        self._at += 1
        logits: torch.Tensor = network.to_logits(x)
        return logits


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


def heal(
    network: DecoderOnlyTransformer, codes: torch.Tensor, anew: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Codes (N, L), some (N, L) drawn anew, each after all before it: one step for each code."""
    step, healed = Cached(network, len(codes)), codes.clone()
    token = shifted(network, codes)[:, 0]
    for at in range(codes.shape[1]):
        logits = step(token)[:, : network.num_tokens - 1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        healed[:, at] = torch.where(anew[:, at], drawn, codes[:, at])
        token = healed[:, at]
    return healed
