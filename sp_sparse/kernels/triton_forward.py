"""Triton code of block-sparse attention: FlashAttention-2's online softmax (arXiv 2307.08691) over lists of key blocks.

One program attends one query block of one head. Scores are in units of log 2, so that `exp2` needs no further factor.
This module imports triton; import it only where a kernel is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_offset(batch, head, stride_batch, stride_head):
    # In 64 bits: a batch of long videos has more than 2^31 elements.
    return batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def _load_tile(
    source, batch, head, start, length, stride_token,
    TMA: tl.constexpr, RAGGED: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Tokens `[start, start + TOKENS)` of one head, 0 past `length`; `source` is a descriptor or its pointer."""
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(TOKENS, HEAD_DIM)
    else:
        tokens = tl.arange(0, TOKENS)
        offsets = tokens[:, None] * stride_token + tl.arange(0, HEAD_DIM)
        pointers = source + start.to(tl.int64) * stride_token + offsets
        inside = (start + tokens < length)[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0) if RAGGED else tl.load(pointers)
    return tile


@triton.jit
def _tile_number(list_start, stride, step, KEY_BLOCK: tl.constexpr, KEY_TILE: tl.constexpr):
    """The `step`-th tile of a list of key blocks, counted from the first key."""
    tiles: tl.constexpr = KEY_BLOCK // KEY_TILE
    return tl.load(list_start + step // tiles * stride) * tiles + step % tiles


@triton.jit
def _attend_tile(
    query, sums, total, top, key, value, batch, head, start, key_length, stride_key_token, stride_value_token, scale,
    TMA: tl.constexpr, RAGGED: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the new (weighted sums of values, sum of weights, largest score)."""
    k = _load_tile(key, batch, head, start, key_length, stride_key_token, TMA, RAGGED, TOKENS, HEAD_DIM)
    scores = tl.dot(query, k.T)
    if RAGGED:
        scores = tl.where((start + tl.arange(0, TOKENS) < key_length)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    v = _load_tile(value, batch, head, start, key_length, stride_value_token, TMA, RAGGED, TOKENS, HEAD_DIM)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    return sums, total * shrink + tl.sum(weights, 1), new_top


@triton.jit(do_not_specialize=["query_length", "key_length"])
def attend_blocks(
    query, key, value, out, lse, indices, counts,
    query_batch, query_token, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    out_batch, out_token, out_head, lse_batch, lse_head,
    indices_batch, indices_head, indices_row, indices_slot, counts_batch, counts_head, counts_row,
    query_length, key_length, scale,
    TMA: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
):  # fmt: skip
    """Attend query block `program_id(0)` of head `program_id(1)` of batch `program_id(2)`.

    query, key, value: pointers to `[B, S, H, D]`, or with TMA descriptors over `[B, H, S, D]` with a block of one tile.
    out: `[B, Sq, H, D]`; lse: fp32 `[B, H, Sq]`; indices, counts: the table of a `BlockMask`; `x_batch`, … are strides.
    scale: factor on the scores times log2(e), not negative. KEY_TILE: keys attended at a time, divides KEY_BLOCK.
    """
    tiles: tl.constexpr = KEY_BLOCK // KEY_TILE
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if not TMA:
        query += _row_offset(batch, head, query_batch, query_head)
        key += _row_offset(batch, head, key_batch, key_head)
        value += _row_offset(batch, head, value_batch, value_head)
    list_start = indices + _row_offset(batch, head, indices_batch, indices_head) + row.to(tl.int64) * indices_row
    count = tl.load(counts + _row_offset(batch, head, counts_batch, counts_head) + row * counts_row)
    last = tl.maximum(count - 1, 0)
    # Lists ascend, so a key block that ends short can only be a list's last entry, which is then attended by itself.
    last_start = tl.load(list_start + last * indices_slot) * KEY_BLOCK
    short = (count > 0) & (last_start + KEY_BLOCK > key_length)

    first_query = row * QUERY_BLOCK
    q = _load_tile(query, batch, head, first_query, query_length, query_token, TMA, True, QUERY_BLOCK, HEAD_DIM)
    sums = tl.zeros([QUERY_BLOCK, HEAD_DIM], tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)

    steps = tl.where(short, last, count) * tiles
    last_step = last * tiles + tiles - 1
    # A tile's number is read two steps before it is attended, so that its loads, one step before, need not wait for it.
    start = _tile_number(list_start, indices_slot, 0, KEY_BLOCK, KEY_TILE) * KEY_TILE
    next_tile = _tile_number(list_start, indices_slot, tl.minimum(1, last_step), KEY_BLOCK, KEY_TILE)
    for step in range(0, steps):
        later = _tile_number(list_start, indices_slot, tl.minimum(step + 2, last_step), KEY_BLOCK, KEY_TILE)
        sums, total, top = _attend_tile(
            q, sums, total, top, key, value, batch, head, start, key_length, key_token, value_token, scale,
            TMA, False, KEY_TILE, HEAD_DIM,
        )  # fmt: skip
        # Triton pipelines a loop only if no value passes through two iterations unchanged: hence numbers and starts.
        start = next_tile * KEY_TILE
        next_tile = later
    if short:
        for part in tl.static_range(tiles):
            first_key = last_start + part * KEY_TILE
            sums, total, top = _attend_tile(
                q, sums, total, top, key, value, batch, head, first_key, key_length, key_token, value_token, scale,
                TMA, True, KEY_TILE, HEAD_DIM,
            )  # fmt: skip

    queries = first_query + tl.arange(0, QUERY_BLOCK)
    inside = queries < query_length
    # A row that attends nothing has total 0 and top -inf: its LSE comes out as -inf, its output must not become 0 / 0.
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    out += _row_offset(batch, head, out_batch, out_head) + first_query.to(tl.int64) * out_token
    offsets = tl.arange(0, QUERY_BLOCK)[:, None] * out_token + tl.arange(0, HEAD_DIM)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside[:, None])
    lse += _row_offset(batch, head, lse_batch, lse_head)
    tl.store(lse + queries, (top + tl.log2(total)) * _LN2, mask=inside)
