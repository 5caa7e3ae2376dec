"""Scores of pairs of blocks from their parts: the share of attention that one block is expected to give another.

With `t` the scaled score of a pair of parts in units of log 2, `n` the tokens of a part:

    mass(query part, key block) = sum over the block's parts of n * 2^t
    score(query block, key block) = log2 of the sum over query parts of n * mass / (sum of mass over all key blocks)

Everything is exact or an IEEE 754 operation of two numbers in a fixed order, so that a score depends on the summaries of its
query block and of all key blocks alone, to the last bit: on no shard, no slice and no device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on
from sp_sparse.selection.exact_log2 import exact_exp2, exact_log2, log2_sum_of_four
from sp_sparse.selection.summaries import LARGEST, LEAST_EXPONENT, SCORE_BITS, block_means, block_scores

# Parts of a block.
PARTS = 4

# A row's masses are added as integers, the largest as 2^this: an int32 holds the sum of 2^11 of them, an int64 of any row.
WEIGHT_BITS = 20

# Pairs of parts that torch scores at a time: bounds the memory of its float64 temporaries.
_BUDGET = 1 << 23


def part_means(x: Tensor, block_size: int) -> Tensor:
    """The mean token of every part of every block: `[B, S, H, D]` -> fp32 `[B, H, N, PARTS, D]`, 0 for an empty part.

    Args:
        block_size: a multiple of `PARTS`; parts are consecutive tokens, those of a short last block as long as others
            while its tokens last.
    """
    means = block_means(x, block_size // PARTS)
    missing = -means.shape[2] % PARTS
    if missing:
        means = torch.nn.functional.pad(means, (0, 0, 0, missing))
    return means.unflatten(2, (means.shape[2] // PARTS, PARTS))


def part_sizes(length: int, block_size: int) -> tuple[int, float]:
    """Full parts of `length` tokens, and log2 of the size of the part that follows them, relative to theirs.

    That is `-inf` where no token is left; it is rounded to fp32, as every implementation must use it.
    """
    part = block_size // PARTS
    full, rest = divmod(length, part)
    return full, float(np.float32(math.log2(rest / part))) if rest else -math.inf


def score_factor(head_dim: int) -> float:
    """From a product of two tokens to an exponent of 2: attention's usual scale `D ** -0.5`, and log2 e; as fp32."""
    return float(np.float32(head_dim**-0.5 * math.log2(math.e)))


def subblock_scores(
    query_parts: Tensor, key_parts: Tensor, query_sizes: tuple[int, float], key_sizes: tuple[int, float]
) -> Tensor:
    """The scores of the module's head: fp32 `[B, H, Nq, Nk]`, finite.

    Args:
        query_parts: some query blocks, `part_means` of them, `[B, H, Nq, PARTS, D]`.
        key_parts: all key blocks of the sequence, `[B, H, Nk, PARTS, D]`.
        query_sizes, key_sizes: `part_sizes` of their tokens.
    """
    if triton_runs_on(query_parts.device):
        from sp_sparse.selection.triton_scores import HEAD_DIMS
        from sp_sparse.selection.triton_subblock import subblock_scores_triton

        if query_parts.shape[4] in HEAD_DIMS:
            factor, limits = score_factor(query_parts.shape[4]), (SCORE_BITS, LARGEST, LEAST_EXPONENT)
            return subblock_scores_triton(query_parts, key_parts, query_sizes, key_sizes, factor, limits, WEIGHT_BITS)
    return subblock_scores_torch(query_parts, key_parts, query_sizes, key_sizes)


def subblock_scores_torch(
    query_parts: Tensor, key_parts: Tensor, query_sizes: tuple[int, float], key_sizes: tuple[int, float]
) -> Tensor:
    """`subblock_scores` in plain torch: any device, the definition that the other equals bit for bit."""
    batch, heads, rows, _, _ = query_parts.shape
    columns = key_parts.shape[2]
    scores = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query_parts.device)
    row_sizes, column_sizes = (
        _log_sizes(rows, query_sizes, scores.device),
        _log_sizes(columns, key_sizes, scores.device),
    )
    step = max(1, _BUDGET // max(1, batch * heads * columns * PARTS**2))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        masses = _log_masses(query_parts[:, :, part], key_parts, column_sizes)
        shares = (masses - _log_totals(masses)).unflatten(2, (-1, PARTS)) + row_sizes[part, :, None]
        scores[:, :, part] = log2_sum_of_four(shares.unbind(3))
    return scores


def _log_masses(query_parts: Tensor, key_parts: Tensor, key_sizes: Tensor) -> Tensor:
    """log2 of the mass that each query part gives each key block: fp32 `[B, H, PARTS * Nq, Nk]`."""
    factor = score_factor(query_parts.shape[4])
    exponents = block_scores(query_parts.flatten(2, 3), key_parts.flatten(2, 3)) * factor
    return log2_sum_of_four((exponents.unflatten(3, key_sizes.shape) + key_sizes).unbind(4))


def _log_totals(masses: Tensor) -> Tensor:
    """log2 of the sum of each query part's masses: fp32 `[B, H, PARTS * Nq, 1]`."""
    most = masses.amax(-1, keepdim=True)
    weights = (exact_exp2(masses - most) * 2.0**WEIGHT_BITS).round_().to(torch.int64)
    return most + (exact_log2(weights.sum(-1, keepdim=True).float()) - float(WEIGHT_BITS))


def _log_sizes(blocks: int, sizes: tuple[int, float], device: torch.device) -> Tensor:
    """log2 of the relative sizes of the parts of blocks: fp32 `[blocks, PARTS]`."""
    full, rest = sizes
    logs = torch.zeros(blocks * PARTS, dtype=torch.float32, device=device)
    logs[full:] = -math.inf
    logs[full : full + 1] = rest
    return logs.view(blocks, PARTS)
