"""`BlockMask.split_keys` (mask.py) in Triton: the tables of all key ranges in one launch.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots of a row that a warp holds in registers, and the most that a program does.
_WARP_SLOTS = 1024
MOST_SLOTS = 16384


def split_rows_triton(indices: Tensor, counts: Tensor, edges: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Cut the ascending lists of a block mask at key blocks: for every range, its indices from 0 on and its counts.

    Args:
        indices: int32 `[B, H, Nq, K]`, `K` from 1 to `MOST_SLOTS`.
        counts: int32 `[B, H, Nq]`.
        edges: ascending key blocks, the first 0; range `i` is `[edges[i], edges[i + 1])`.

    Returns:
        int32 `[B, H, Nq, min(K, blocks of the range)]` and `[B, H, Nq]` of each range; entries past a count are 0.
    """
    *shape, slots = indices.shape
    rows = counts.numel()
    widths = [min(slots, last - first) for first, last in zip(edges[:-1], edges[1:], strict=True)]
    # One after the other, so that the kernel finds them by itself.
    tables = torch.empty(rows * sum(widths), dtype=torch.int32, device=indices.device)
    parts = torch.empty(len(widths), *shape, dtype=torch.int32, device=indices.device)
    if rows:
        block = triton.next_power_of_2(slots)
        # Triton compiles anew for integers of a tuple that are 1 or multiples of 16, which no odd number from 3 on is.
        odd_edges = tuple(2 * edge + 3 for edge in edges)
        with torch.cuda.device_of(indices):
            split_row[(rows,)](
                indices, counts.contiguous(), tables, parts, *indices.stride(), shape[1], shape[2], rows, slots,
                odd_edges, BLOCK=block, num_warps=max(1, block // _WARP_SLOTS),
            )  # fmt: skip
    pieces = tables.split([rows * width for width in widths])
    return [(piece.view(*shape, width), part) for piece, width, part in zip(pieces, widths, parts, strict=True)]


@triton.jit(do_not_specialize=["heads", "query_blocks", "rows", "slots"])
def split_row(
    indices, counts, tables, parts, stride_batch, stride_head, stride_row, stride_slot, heads, query_blocks, rows, slots,
    odd_edges, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cut row `program_id(0)` of `[B * heads * query_blocks]`; BLOCK is a power of two >= slots."""
    row = tl.program_id(0)
    query_block, head, batch = row % query_blocks, row // query_blocks % heads, row // query_blocks // heads
    indices += batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    indices += query_block.to(tl.int64) * stride_row
    numbers = tl.arange(0, BLOCK)
    used = numbers < tl.load(counts + row)
    block = tl.load(indices + numbers * stride_slot, mask=used, other=0)
    begin = 0
    for part in tl.static_range(len(odd_edges) - 1):
        first, last = (odd_edges[part] >> 1) - 1, (odd_edges[part + 1] >> 1) - 1
        width = tl.minimum(slots, last - first)
        # A row is ascending, so what lies in the range is one run of slots.
        end = tl.sum((used & (block < last)).to(tl.int32))
        table = tables + row.to(tl.int64) * width
        tl.store(table + numbers - begin, block - first, mask=(numbers >= begin) & (numbers < end))
        tl.store(table + numbers, 0, mask=(numbers >= end - begin) & (numbers < width))
        tl.store(parts + row, end - begin)
        tables += rows.to(tl.int64) * width
        parts += rows
        begin = end
