"""What stands for the key blocks that a mask leaves out: their mean keys and values, and how values move with keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on, without_autocast
from sp_sparse.mask import num_blocks

# Elements converted at a time: bounds the memory of the temporaries in higher precision.
_BUDGET = 1 << 24


@dataclass(frozen=True, eq=False)
class BlockMeans:
    """Of some key blocks, or of all of a sequence.

    Attributes:
        tokens: mean key and mean value of every block, `[B, H, N, 2, D]`, in the dtype of the keys.
        slope: the sum over all tokens of `(k - mean key of its block)^T v`, `[B, H, D, D]`, fp32 (fp64 for fp64 keys);
            None where the remainder has no linear term.
    """

    tokens: Tensor
    slope: Tensor | None


def block_means(key: Tensor, value: Tensor, block_size: int, linear: bool) -> BlockMeans:
    """Those of `[B, S, H, D]` keys and values that start at a block edge; the last block may be short."""
    if triton_runs_on(key.device):
        from sp_sparse.remainder.triton_means import block_means_triton, takes_tokens

        if takes_tokens(key, value, block_size):
            return BlockMeans(*block_means_triton(key, value, block_size, linear))
    with without_autocast(key.device):
        return BlockMeans(*block_means_torch(key, value, block_size, linear))


def block_means_torch(key: Tensor, value: Tensor, block_size: int, linear: bool) -> tuple[Tensor, Tensor | None]:
    """`block_means` in plain torch, on any device: the tokens and the slope."""
    batch, length, heads, head_dim = key.shape
    blocks = num_blocks(length, block_size)
    compute = torch.float64 if key.dtype == torch.float64 else torch.float32
    tokens = torch.empty(batch, heads, blocks, 2, head_dim, dtype=key.dtype, device=key.device)
    slope = torch.zeros(batch, heads, head_dim, head_dim, dtype=compute, device=key.device) if linear else None
    # Whole blocks a few at a time, then the one that ends short.
    edges = [
        *range(
            0,
            length - length % block_size,
            max(1, _BUDGET // (batch * heads * head_dim or 1) // block_size) * block_size,
        )
    ]
    edges += [length - length % block_size, length] if length % block_size else [length]
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        size = min(block_size, last - first)
        k, v = (x[:, first:last].to(compute).unflatten(1, (-1, size)) for x in (key, value))
        means = [x.mean(2, keepdim=True) for x in (k, v)]
        part = slice(first // block_size, num_blocks(last, block_size))
        for side, mean in enumerate(means):
            tokens[:, :, part, side] = mean.squeeze(2).transpose(1, 2).to(tokens.dtype)
        if slope is not None:
            slope += torch.einsum("bnthd,bnthe->bhde", k - means[0], v)
    return tokens, slope
