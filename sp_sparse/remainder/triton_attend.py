"""`add_remainder` of remainder/attend.py in Triton: one pass that attends the means and merges into the exact output.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.mask import BlockMask

_QUERY_TILES = {64: 64, 128: 128, 256: 128}
_HEAD_DIMS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16)

# Bytes of the map of chosen blocks: bounds its memory, a slice of query blocks a launch.
_BUDGET = 1 << 25

_LOG2_E = tl.constexpr(math.log2(math.e))


def takes_query(query: Tensor, out: Tensor, mask: BlockMask) -> bool:
    """Whether `add_remainder_triton` takes these `[B, S, H, D]` tensors and blocks of this size."""
    return (
        mask.block_size[0] in _QUERY_TILES
        and query.shape[3] in _HEAD_DIMS
        and query.dtype == out.dtype
        and query.dtype in _DTYPES
        and query.stride(3) == out.stride(3) == 1
    )


def add_remainder_triton(
    out: Tensor, lse: Tensor, query: Tensor, tokens: Tensor, slope: Tensor | None, mask: BlockMask, scale: float
) -> Tensor:
    """`out` itself, with the remainder merged into it.

    Args:
        out, query: `[B, Sq, H, D]`, fp16 or bf16, the last dimension contiguous.
        lse: fp32 `[B, H, Sq]`.
        tokens: `[B, H, N, 2, D]` of the same dtype.
        slope: scaled, `[B, H, D, D]`, or None; rounded to the dtype of `query` before it meets it.
        mask, scale: as for `add_remainder`.
    """
    batch, length, heads, head_dim = query.shape
    block, blocks = mask.block_size[0], mask.num_key_blocks
    query_tile = _QUERY_TILES[block]
    matrix = tokens if slope is None else slope.to(query.dtype).contiguous()
    rows = max(1, _BUDGET // (batch * heads * blocks))
    # A device with little shared memory holds two stages of 64 means.
    hopper = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] == 9
    tile = query_tile if hopper else 64
    for first in range(0, mask.num_query_blocks, rows):
        part = mask.query_rows(first, min(first + rows, mask.num_query_blocks))
        chosen = part.to_dense().view(torch.uint8)
        tiles = part.num_query_blocks * (block // query_tile)
        with torch.cuda.device_of(query):
            merge_means[(tiles, heads, batch)](
                query, tokens, matrix, chosen, out, lse, *query.stride()[:3], *tokens.stride()[:4], *chosen.stride()[:3],
                *out.stride()[:3], *lse.stride(), first * block, length, blocks, scale,
                math.log2(mask.block_size[1]), math.log2(mask.last_key_tokens), torch.finfo(out.dtype).max,
                LINEAR=slope is not None, PER_BLOCK=block // query_tile, QUERY_TILE=query_tile, TILE=tile,
                HEAD_DIM=head_dim, num_warps=query_tile // 16, num_stages=2,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["first_query", "query_length", "blocks"])
def merge_means(
    query, tokens, slope, chosen, out, lse,
    query_batch, query_token, query_head, tokens_batch, tokens_head, tokens_block, tokens_side,
    chosen_batch, chosen_head, chosen_row, out_batch, out_token, out_head, lse_batch, lse_head, lse_token,
    first_query, query_length, blocks, scale, log_block, log_last, most,
    LINEAR: tl.constexpr, PER_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Tile `program_id(0)` of the queries from `first_query` on, of head `program_id(1)` of batch `program_id(2)`.

    query, out: `[B, S, H, D]`; tokens: `[B, H, N, 2, D]`; slope: contiguous `[B, H, D, D]`, unused unless LINEAR; chosen:
    bytes `[B, H, rows, N]` from the row of `first_query` on; lse: fp32 `[B, H, S]`; `x_batch`, … are strides. `log_block`
    and `log_last` are log2 of the tokens of a key block and of the last. PER_BLOCK: tiles of a query block.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane, group = batch.to(tl.int64), head.to(tl.int64)
    query += lane * query_batch + group * query_head
    tokens += lane * tokens_batch + group * tokens_head
    chosen += lane * chosen_batch + group * chosen_head + (part // PER_BLOCK).to(tl.int64) * chosen_row
    columns = tl.arange(0, HEAD_DIM)
    queries = first_query + part * QUERY_TILE + tl.arange(0, QUERY_TILE)
    inside = queries < query_length
    queries = queries.to(tl.int64)
    q = tl.load(query + queries[:, None] * query_token + columns, mask=inside[:, None], other=0.0)
    sums = tl.zeros([QUERY_TILE, HEAD_DIM], tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    # In units of log 2, so that `exp2` needs no further factor.
    unit = scale * _LOG2_E
    for start in range(0, blocks, TILE):
        numbers = start + tl.arange(0, TILE)
        there = numbers < blocks
        mean = tokens + numbers.to(tl.int64)[:, None] * tokens_block + columns
        k = tl.load(mean, mask=there[:, None], other=0.0)
        taken = tl.load(chosen + numbers, mask=there, other=1)
        bias = tl.where(taken != 0, float("-inf"), tl.where(numbers == blocks - 1, log_last, log_block))
        scores = tl.dot(q, k.T) * unit + bias[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row may have been offered chosen blocks alone so far: (-inf) - (-inf) would be NaN.
        floor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - floor[:, None])
        shrink = tl.exp2(top - floor)
        v = tl.load(mean + tokens_side, mask=there[:, None], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
    rest = sums / tl.where(total > 0, total, 1.0)[:, None]
    if LINEAR:
        slope += (lane * tl.num_programs(1) + group) * HEAD_DIM * HEAD_DIM
        rest += tl.dot(q, tl.load(slope + columns[:, None] * HEAD_DIM + columns))
    rest = tl.where((total > 0)[:, None], rest, 0.0)

    lse += lane * lse_batch + group * lse_head + queries * lse_token
    exact_log = tl.load(lse, mask=inside, other=float("-inf")) * _LOG2_E
    rest_log = top + tl.log2(total)
    high = tl.maximum(exact_log, rest_log)
    floor = tl.where(high == float("-inf"), 0.0, high)
    exact_weight, rest_weight = tl.exp2(exact_log - floor), tl.exp2(rest_log - floor)
    both = exact_weight + rest_weight
    both = tl.where(both > 0, both, 1.0)
    entries = out + lane * out_batch + group * out_head + queries[:, None] * out_token + columns
    exact = tl.load(entries, mask=inside[:, None], other=0.0).to(tl.float32)
    merged = exact * (exact_weight / both)[:, None] + rest * (rest_weight / both)[:, None]
    merged = tl.minimum(tl.maximum(merged, -most), most)
    tl.store(entries, merged.to(out.dtype.element_ty), mask=inside[:, None])
