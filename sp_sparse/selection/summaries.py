"""Block summaries and their scores, exact and therefore the same on every mesh.

A mean or a dot product in floating point depends on the order of its additions, and that order depends on tensor shapes,
hence on how many heads and blocks a rank holds. Here every sum is one of integers small enough to be exact: values are
rounded to fixed point relative to the largest of their own block (or vector), which no sharding changes. The masks that
follow are bit-identical for every mesh, every kernel and every device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on
from sp_sparse.mask import num_blocks

# Bits of a summary's entries in a score: two bytes each, which tensor cores multiply exactly.
SCORE_BITS = 14

# In a score entries count as no larger than this, and the exponent that bounds a vector as no smaller. For D up to 128 all
# scores but 0 are then between 2^-124 and 2^125: no implementation meets an overflow or a subnormal number.
LARGEST = 2.0**59
LEAST_EXPONENT = -48

# Elements converted at a time: bounds the memory of the fp32 and int32 temporaries.
_BUDGET = 1 << 24


def block_means(x: Tensor, block_size: int) -> Tensor:
    """The mean token of every block and head: `[B, S, H, D]` -> fp32 `[B, H, N, D]`; the last block may be short.

    The mean of a block is computed as `int_sum * 2^(e - bits) * fp32(1 / tokens)`, where `2^e` bounds the largest
    absolute value of that block and head, and each value enters as an integer of `bits` bits.
    """
    if triton_runs_on(x.device):
        from sp_sparse.selection.triton_means import block_means_triton, takes_tokens

        if takes_tokens(x, block_size):
            return block_means_triton(x, block_size)
    return block_means_torch(x, block_size)


def block_means_torch(x: Tensor, block_size: int) -> Tensor:
    """`block_means` in plain torch: any device, the definition that the others equal bit for bit."""
    batch, length, heads, head_dim = x.shape
    full = length // block_size
    means = torch.empty(batch, num_blocks(length, block_size), heads, head_dim, dtype=torch.float32, device=x.device)
    step = max(1, _BUDGET // max(1, batch * block_size * heads * head_dim))
    for start in range(0, full, step):
        stop = min(full, start + step)
        tokens = x[:, start * block_size : stop * block_size]
        means[:, start:stop] = _exact_mean(tokens.reshape(batch, stop - start, block_size, heads, head_dim))
    if length % block_size:
        means[:, full] = _exact_mean(x[:, full * block_size :].unsqueeze(1))[:, 0]
    return means.transpose(1, 2)


def block_scores(query_means: Tensor, key_means: Tensor) -> Tensor:
    """Exact dot products of summaries: fp32 `[B, H, Nq, D]`, `[B, H, Nk, D]` -> fp32 `[B, H, Nq, Nk]`.

    A summary is rounded to `integers * 2^(e - 14)`, where `2^e` bounds its largest absolute value; a score is the sum of
    products of two such vectors, exact, and then rounded once to fp32.
    """
    if triton_runs_on(query_means.device):
        from sp_sparse.selection.triton_scores import HEAD_DIMS, block_scores_triton

        if query_means.shape[3] in HEAD_DIMS:
            return block_scores_triton(query_means, key_means, SCORE_BITS, LARGEST, LEAST_EXPONENT)
    return block_scores_torch(query_means, key_means)


def block_scores_torch(query_means: Tensor, key_means: Tensor) -> Tensor:
    """`block_scores` in plain torch: any device, the definition that the other equals bit for bit."""
    query, query_exponent = _fixed_point(query_means)
    key, key_exponent = _fixed_point(key_means)
    # Integers up to 2^14 in a double: every product and partial sum is exact, so any order gives the same bits.
    scores = query.double() @ key.double().transpose(-1, -2)
    scores *= _power_of_two(query_exponent, torch.float64)
    scores *= _power_of_two(key_exponent, torch.float64).transpose(-1, -2)
    return scores.float()


def _exact_mean(tokens: Tensor) -> Tensor:
    """`[B, N, n, H, D]` -> fp32 `[B, N, H, D]`."""
    count = tokens.shape[2]
    # `count` integers of this many bits sum to less than 2^31.
    bits = min(22, 30 - math.ceil(math.log2(count)))
    exponent = torch.frexp(tokens.abs().amax(dim=(2, 4), keepdim=True).float()).exponent.clamp_(min=-100)
    fixed = (tokens.float() * _power_of_two(bits - exponent, torch.float32)).round_().to(torch.int32)
    total = fixed.sum(dim=2, dtype=torch.int32).float() * _power_of_two(exponent - bits, torch.float32).squeeze(2)
    return total * _reciprocal(count)


def _fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors along the last dimension as `integers * 2^exponent`, the integers up to `2^SCORE_BITS`."""
    x = x.clamp(-LARGEST, LARGEST)
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp_(min=LEAST_EXPONENT) - SCORE_BITS
    return (x * _power_of_two(-exponent, torch.float32)).round_(), exponent


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2 to an integer power, exact: the bits are written, as `pow` may be off by a rounding."""
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent + 127) << 23).view(torch.float32)


def _reciprocal(count: int) -> float:
    """1 / count rounded to fp32, as every implementation must use it."""
    return float(np.float32(1.0 / count))
