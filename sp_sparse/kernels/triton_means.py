"""`block_means` of selection/summaries.py in Triton: one pass over the tokens, the same bits as in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sp_sparse.mask import num_blocks

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_HEAD_DIMS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Bits of a value in fixed point: 256 such integers sum to less than 2^31.
_BITS = 22


def takes_tokens(x: Tensor, block_size: int) -> bool:
    """Whether `block_means_triton` takes `x`, `[B, S, H, D]`, in blocks of `block_size` tokens."""
    return x.shape[3] in _HEAD_DIMS and block_size in _BLOCK_SIZES and x.dtype in _DTYPES and x.stride(3) == 1


def block_means_triton(x: Tensor, block_size: int) -> Tensor:
    """The mean token of every block and head: `[B, S, H, D]` fp16, bf16 or fp32 -> fp32 `[B, H, N, D]`.

    Bit for bit what `block_means_torch` returns: sums of fixed-point integers have one value in any order.
    """
    batch, length, heads, head_dim = x.shape
    blocks = num_blocks(length, block_size)
    means = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    if means.numel() == 0:
        return means

    from sp_sparse.kernels.triton_reduce import mean_blocks

    last = length - (blocks - 1) * block_size
    with torch.cuda.device_of(x):
        # Heads change fastest: programs that run together then read whole tokens.
        mean_blocks[(heads * blocks, batch)](
            x, means, *x.stride()[:3], length, heads, blocks, 1 / last,
            BLOCK=block_size, BITS=_BITS, RECIPROCAL=1 / block_size, HEAD_DIM=head_dim,
            num_warps=max(1, block_size * head_dim // 2048), enable_fp_fusion=True,
        )  # fmt: skip
    return means
