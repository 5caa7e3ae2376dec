"""`block_scores` of selection/summaries.py in Triton: exact integer products on the tensor cores.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.selection.triton_means import frexp_exponent, power_of_two, round_scaled

HEAD_DIMS = (64, 128)

# Blocks of queries and of keys that a program scores.
_ROWS, _COLUMNS = 64, 64


def block_scores_triton(
    query_means: Tensor, key_means: Tensor, bits: int, largest: float, least_exponent: int
) -> Tensor:
    """fp32 `[B, H, Nq, D]`, `[B, H, Nk, D]` -> fp32 `[B, H, Nq, Nk]`, bit for bit as `block_scores_torch`.

    Args:
        query_means, key_means: on one device, any strides, `D` of `HEAD_DIMS`.
        bits: bits of an entry in fixed point, at most 14.
        largest: entries are clamped to this magnitude.
        least_exponent: of the power of two that bounds a vector's entries.
    """
    batch, heads, rows, head_dim = query_means.shape
    columns = key_means.shape[2]
    scores = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query_means.device)
    if scores.numel():
        grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS), batch * heads)
        with torch.cuda.device_of(query_means):
            score_tiles[grid](
                query_means, key_means, scores, *query_means.stride(), *key_means.stride(), heads, rows, columns,
                BITS=bits, LARGEST=largest, LEAST_EXPONENT=least_exponent, ROWS=_ROWS, COLUMNS=_COLUMNS,
                HEAD_DIM=head_dim, num_warps=4,
            )  # fmt: skip
    return scores


@triton.jit
def load_limbs(
    means, batch, head, first, rows, stride_batch, stride_head, stride_row, stride_column,
    BITS: tl.constexpr, LARGEST: tl.constexpr, LEAST_EXPONENT: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Vectors `[first, first + ROWS)` of a head as `(256 * high + low) * scale`: high and low int8, scale fp32."""
    numbers = first + tl.arange(0, ROWS)
    means += batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    offsets = numbers[:, None].to(tl.int64) * stride_row + tl.arange(0, HEAD_DIM) * stride_column
    x = tl.load(means + offsets, mask=(numbers < rows)[:, None], other=0.0)
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    exponent = tl.maximum(frexp_exponent(tl.max(tl.abs(x), 1)), LEAST_EXPONENT)
    fixed = round_scaled(x, power_of_two(BITS - exponent)[:, None])
    # Up to 2^14 in magnitude: low is in [-128, 128), high in [-64, 64].
    high = (fixed + 128) >> 8
    return high.to(tl.int8), (fixed - high * 256).to(tl.int8), power_of_two(exponent - BITS)


@triton.jit
def score_limbs(query_high, query_low, query_scale, key_high, key_low, key_scale):
    """Scores of the vectors that `load_limbs` loads: fp32 `[rows, columns]`."""
    high = tl.dot(query_high, key_high.T, out_dtype=tl.int32)
    middle = tl.dot(query_high, key_low.T, out_dtype=tl.int32)
    middle = tl.dot(query_low, key_high.T, middle, out_dtype=tl.int32)
    low = tl.dot(query_low, key_low.T, out_dtype=tl.int32)
    # For D up to 128 the middle sum is up to 2^21, so that only the high one leaves 32 bits.
    total = (high.to(tl.int64) << 16) + (middle * 256 + low)
    # The one rounding; the products with powers of two after it are exact.
    return total.to(tl.float32) * query_scale[:, None] * key_scale[None, :]


@triton.jit(do_not_specialize=["heads", "rows", "columns"])
def score_tiles(
    query, key, scores, query_batch, query_head, query_row, query_column, key_batch, key_head, key_row, key_column,
    heads, rows, columns,
    BITS: tl.constexpr, LARGEST: tl.constexpr, LEAST_EXPONENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Score `ROWS` query blocks `program_id(1)` with `COLUMNS` key blocks `program_id(0)` of head `program_id(2)`.

    query, key: fp32 `[B, H, N, D]`; scores: fp32, contiguous `[B, H, Nq, Nk]`; `x_batch`, … are strides.
    """
    pair = tl.program_id(2)
    batch, head = pair // heads, pair % heads
    first_row, first_column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    query_high, query_low, query_scale = load_limbs(
        query, batch, head, first_row, rows, query_batch, query_head, query_row, query_column,
        BITS, LARGEST, LEAST_EXPONENT, ROWS, HEAD_DIM,
    )  # fmt: skip
    key_high, key_low, key_scale = load_limbs(
        key, batch, head, first_column, columns, key_batch, key_head, key_row, key_column,
        BITS, LARGEST, LEAST_EXPONENT, COLUMNS, HEAD_DIM,
    )  # fmt: skip
    result = score_limbs(query_high, query_low, query_scale, key_high, key_low, key_scale)
    row, column = first_row + tl.arange(0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    scores += (pair.to(tl.int64) * rows + row) * columns + column
    tl.store(scores, result, mask=(row < rows) & (column < columns))
