"""Rows of `select_topk` (selection/topk.py) in Triton: a threshold by radix search, then compaction, without a sort.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks of a row that a warp holds in registers, and the most that a program does.
_WARP_BLOCKS = 1024
MOST_BLOCKS = 16384


def select_rows_triton(
    scores: Tensor, static: Tensor, static_counts: Tensor, keep: int, width: int
) -> tuple[Tensor, Tensor]:
    """The static blocks of every row, then its highest scores, ascending: indices `[B, H, Nq, width]` and counts, int32.

    Args:
        scores: fp32 `[B, H, Nq, Nk]`, `Nk` from 1 to `MOST_BLOCKS`.
        static: bool `[Nq, Nk]`.
        static_counts: int32 `[Nq]`, static blocks a row.
        keep: blocks of a row unless more are static, at most `Nk`.
        width: the most blocks of any row.
    """
    *shape, columns = scores.shape
    indices = torch.empty(*shape, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(shape, dtype=torch.int32, device=scores.device)
    if counts.numel():
        block = triton.next_power_of_2(columns)
        with torch.cuda.device_of(scores):
            select_row[(counts.numel(),)](
                scores.contiguous(), static.contiguous().view(torch.int8), static_counts, indices, counts,
                shape[-1], columns, keep, width, BLOCK=block, num_warps=max(1, block // _WARP_BLOCKS),
            )  # fmt: skip
    return indices, counts


@triton.jit(do_not_specialize=["rows", "columns", "keep", "width"])
def select_row(scores, static, static_counts, indices, counts, rows, columns, keep, width, BLOCK: tl.constexpr):
    """Select for row `program_id(0)` of `[B * H * rows]`; all tensors contiguous, BLOCK a power of two >= columns."""
    row = tl.program_id(0).to(tl.int64)
    query_block = row % rows
    numbers = tl.arange(0, BLOCK)
    inside = numbers < columns
    score = tl.load(scores + row * columns + numbers, mask=inside, other=0.0)
    fixed = tl.load(static + query_block * columns + numbers, mask=inside, other=0) != 0
    # The bits of a float order as integers once those of negative numbers are flipped; 0.0 stands for -0.0 too.
    key = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    # Above and below the keys of all numbers.
    key = tl.where(fixed, 0x7FFFFFFF, key)
    key = tl.where(inside, key, -0x80000000)

    count = tl.maximum(tl.load(static_counts + query_block), keep)
    # A threshold that `count` keys reach, from its highest bit down, until it is the largest or no more keys reach it.
    # Its highest bit is the sign, hence the xor.
    threshold, reached = tl.full([], -0x80000000, tl.int32), tl.full([], BLOCK, tl.int32)
    bit = tl.full([], 31, tl.int32)
    while (reached != count) & (bit >= 0):
        higher = threshold ^ (1 << bit)
        number = tl.sum((key >= higher).to(tl.int32))
        threshold = tl.where(number >= count, higher, threshold)
        reached = tl.where(number >= count, number, reached)
        bit -= 1

    # Both numbers of earlier blocks from one scan: of those above the threshold, low half, and of those on it, high half.
    above, on = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
    ties = count - tl.sum(above)
    both = above | (on << 16)
    before = tl.cumsum(both) - both
    above_before, on_before = before & 0xFFFF, before >> 16
    chosen = (above | (on & (on_before < ties).to(tl.int32))) != 0
    indices += row * width
    tl.store(indices + above_before + tl.minimum(on_before, ties), numbers, mask=chosen)
    tl.store(indices + numbers, 0, mask=(numbers >= count) & (numbers < width))
    tl.store(counts + row, count)
