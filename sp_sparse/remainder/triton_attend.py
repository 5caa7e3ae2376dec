"""`add_remainder` of remainder/attend.py in Triton: one pass that attends the means and merges into the exact output.

FlashAttention-2's online softmax (arXiv 2307.08691) over all means, those of kept blocks silenced by a bias of `-inf`. On
compute capability 9.0 and later tiles of means are fetched by the copy engine (TMA tensor descriptors).

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.kernels.triton_config import launch_config
from sp_sparse.mask import BlockMask

_QUERY_TILES = {64: 64, 128: 128, 256: 128}
_HEAD_DIMS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16)

# Entries of the table of biases, 64 MB of fp32: bounds its memory, a slice of query blocks a launch.
_BUDGET = 1 << 24

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
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    tokens: Tensor,
    slope: Tensor | None,
    mask: BlockMask,
    scale: float,
    tma: bool = True,
) -> Tensor:
    """`out` itself, with the remainder merged into it.

    Args:
        out, query: `[B, Sq, H, D]`, fp16 or bf16, the last dimension contiguous.
        lse: fp32 `[B, H, Sq]`.
        tokens: `[B, H, N, 2, D]` of the same dtype, the last two dimensions contiguous.
        slope: scaled, `[B, H, D, D]`, or None; rounded to the dtype of `query` before it meets it.
        mask, scale: as for `add_remainder`.
        tma: use TMA descriptors where the device has them; False never does.
    """
    batch, length, heads, head_dim = query.shape
    block, blocks = mask.block_size[0], mask.num_key_blocks
    query_tile = _QUERY_TILES[block]
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
    tma = tma and (capability >= (9, 0) or not query.is_cuda)
    # As the attention kernel: it is the same loop.
    config = launch_config((query_tile, 128), head_dim, tma, capability)
    source = _descriptor(tokens, config.tile) if tma else tokens
    matrix = tokens if slope is None else slope.to(query.dtype).contiguous()
    rows = max(1, _BUDGET // (batch * heads * blocks))
    for first in range(0, mask.num_query_blocks, rows):
        part = mask.query_rows(first, min(first + rows, mask.num_query_blocks))
        bias = make_biases(part, config.tile)
        tiles = part.num_query_blocks * (block // query_tile)
        with torch.cuda.device_of(query):
            merge_means[(tiles, heads, batch)](
                query, source, matrix, bias, out, lse, *query.stride()[:3], *tokens.stride()[:3], *bias.stride()[:3],
                *out.stride()[:3], *lse.stride(), first * block, length, blocks, scale, torch.finfo(out.dtype).max,
                TMA=tma, LINEAR=slope is not None, PER_BLOCK=block // query_tile, QUERY_TILE=query_tile,
                TILE=config.tile, HEAD_DIM=head_dim, num_warps=config.warps, num_stages=config.stages,
                maxnreg=config.registers, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def make_biases(mask: BlockMask, tile: int) -> Tensor:
    """What is added to the scores of the means, in log2: log2 of a block's tokens, `-inf` where it is kept or there is none.

    Returns:
        fp32 `[B, H, Nq, N]`, `N` rounded up to whole tiles.
    """
    batch, heads, rows = mask.counts.shape
    blocks = mask.num_key_blocks
    width = triton.cdiv(blocks, tile) * tile
    bias = torch.empty(batch, heads, rows, width, dtype=torch.float32, device=mask.indices.device)
    with torch.cuda.device_of(bias):
        offer_blocks[(rows, heads, batch)](
            mask.indices, mask.counts, bias, *mask.indices.stride(), *mask.counts.stride(), blocks, width,
            math.log2(mask.block_size[1]), math.log2(mask.last_key_tokens), SLOTS=128, num_warps=1,
        )  # fmt: skip
    return bias


@triton.jit(do_not_specialize=["blocks", "width"])
def offer_blocks(
    indices, counts, bias, indices_batch, indices_head, indices_row, indices_slot, counts_batch, counts_head, counts_row,
    blocks, width, whole, last,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)` of head `program_id(1)` of batch `program_id(2)`: log2 of tokens, then `-inf` over what is kept.

    bias: contiguous `[B, H, Nq, width]`; whole, last: log2 of the tokens of a block, and of the last one.
    """
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # In 64 bits, as in `merge_means`.
    lane, group, line = batch.to(tl.int64), head.to(tl.int64), row.to(tl.int64)
    bias += ((lane * tl.num_programs(1) + group) * tl.num_programs(0) + line) * width
    indices += lane * indices_batch + group * indices_head + line * indices_row
    slots = tl.arange(0, SLOTS)
    for start in range(0, width, SLOTS):
        block = start + slots
        offer = tl.where(block < blocks - 1, whole, tl.where(block == blocks - 1, last, float("-inf")))
        tl.store(bias + block, offer, mask=block < width)
    # Other threads write over these entries.
    tl.debug_barrier()
    count = tl.load(counts + lane * counts_batch + group * counts_head + line * counts_row)
    for start in range(0, count, SLOTS):
        used = start + slots < count
        kept = tl.load(indices + (start + slots) * indices_slot, mask=used, other=0)
        tl.store(bias + kept, float("-inf"), mask=used)


def _descriptor(tokens: Tensor, tile: int):
    """Means as `[B, H, N, 2 D]` in tiles of one side of `tile` blocks; 0 is read past the end."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, blocks, _, head_dim = tokens.shape
    # A descriptor wants a valid stride for a dimension of size 1 too.
    strides = [s if n > 1 else 2 * head_dim for n, s in zip(tokens.shape[:3], tokens.stride()[:3], strict=True)]
    return TensorDescriptor(tokens, [batch, heads, blocks, 2 * head_dim], [*strides, 1], [1, 1, tile, head_dim])


@triton.jit(do_not_specialize=["first_query", "query_length", "blocks"])
def merge_means(
    query, tokens, slope, bias, out, lse,
    query_batch, query_token, query_head, tokens_batch, tokens_head, tokens_block,
    bias_batch, bias_head, bias_row, out_batch, out_token, out_head, lse_batch, lse_head, lse_token,
    first_query, query_length, blocks, scale, most,
    TMA: tl.constexpr, LINEAR: tl.constexpr, PER_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Tile `program_id(0)` of the queries from `first_query` on, of head `program_id(1)` of batch `program_id(2)`.

    query, out: `[B, S, H, D]`; tokens: `[B, H, N, 2, D]`, or with TMA its descriptor; slope: contiguous `[B, H, D, D]`,
    unused unless LINEAR; bias: of the query blocks from that of `first_query` on, in whole tiles; lse: fp32 `[B, H, S]`;
    `x_batch`, … are strides. PER_BLOCK: tiles of a query block.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # In 64 bits: a batch of long videos has more than 2^31 elements.
    lane, group = batch.to(tl.int64), head.to(tl.int64)
    query += lane * query_batch + group * query_head
    bias += lane * bias_batch + group * bias_head + (part // PER_BLOCK).to(tl.int64) * bias_row
    columns, numbers = tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    if not TMA:
        tokens += lane * tokens_batch + group * tokens_head + columns
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
        offer = tl.load(bias + start + numbers)
        if TMA:
            k = tokens.load([batch, head, start, 0]).reshape(TILE, HEAD_DIM)
        else:
            there = (start + numbers < blocks)[:, None]
            mean = tokens + (start + numbers).to(tl.int64)[:, None] * tokens_block
            k = tl.load(mean, mask=there, other=0.0)
        scores = tl.dot(q, k.T) * unit + offer[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row may have been offered kept blocks alone so far: (-inf) - (-inf) would be NaN.
        floor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - floor[:, None])
        shrink = tl.exp2(top - floor)
        if TMA:
            v = tokens.load([batch, head, start, HEAD_DIM]).reshape(TILE, HEAD_DIM)
        else:
            v = tl.load(mean + HEAD_DIM, mask=there, other=0.0)
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
