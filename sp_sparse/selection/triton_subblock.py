"""`subblock_scores` of selection/subblock_scores.py in Triton: parts of keys are put together in registers, the same bits.

Every fp32 operation is rounded on its own (`enable_fp_fusion=False`), in the order of the torch code. This module imports
triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.selection.exact_log2 import EXP2, LEAST_POWER, LOG2
from sp_sparse.selection.triton_means import round_scaled
from sp_sparse.selection.triton_scores import load_limbs, score_limbs

PARTS = 4

# Blocks of which a program splits one part.
_BLOCKS = 32

# Query parts and key blocks that a program weighs.
_ROWS, _COLUMNS = 64, 64

# Key blocks of a row that a program reads at a time.
_WIDTH = 1024

_LEAST_POWER = tl.constexpr(LEAST_POWER)
_E0, _E1, _E2, _E3 = (tl.constexpr(x) for x in EXP2)
_L0, _L1, _L2, _L3, _L4, _L5 = (tl.constexpr(x) for x in LOG2)


def subblock_scores_triton(
    query_parts: Tensor,
    key_parts: Tensor,
    query_sizes: tuple[int, float],
    key_sizes: tuple[int, float],
    factor: float,
    limits: tuple[int, float, int],
    weight_bits: int,
) -> Tensor:
    """fp32 `[B, H, Nq, 4, D]`, `[B, H, Nk, 4, D]` -> fp32 `[B, H, Nq, Nk]`, bit for bit as `subblock_scores_torch`.

    It holds the masses of the query parts, `[B, H, 4 Nq, Nk]`, and the parts as int8; no tensor of pairs of parts.

    Args:
        query_parts, key_parts: on one device, `D` of `triton_scores.HEAD_DIMS`.
        query_sizes, key_sizes: full parts, and log2 of the relative size of the one that follows them.
        factor: from a product of two tokens to an exponent of 2.
        limits: `bits`, `largest` and `least_exponent` of `block_scores_triton`.
        weight_bits: the largest mass of a row is 2^this when masses are added as integers, at most 20.
    """
    batch, heads, rows, _, head_dim = query_parts.shape
    columns = key_parts.shape[2]
    scores = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query_parts.device)
    if scores.numel() == 0:
        return scores
    masses = torch.empty(batch, heads, rows, PARTS, columns, dtype=torch.float32, device=query_parts.device)
    query, key = split_parts(query_parts, limits), split_parts(key_parts, limits)
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows * PARTS, _ROWS), batch * heads)
    with torch.cuda.device_of(query_parts):
        mass_tiles[grid](
            *query, *key, masses, rows * PARTS, columns, *key_sizes, factor,
            ROWS=_ROWS, COLUMNS=_COLUMNS, HEAD_DIM=head_dim, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        share_rows[(batch * heads * rows,)](
            masses, scores, rows, columns, *query_sizes,
            BITS=weight_bits, WIDTH=_WIDTH, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return scores


def split_parts(parts: Tensor, limits: tuple[int, float, int]) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 `[B, H, N, PARTS, D]`, any strides, as `(256 * high + low) * scale`: int8, int8 and fp32, once for all pairs."""
    batch, heads, blocks, _, head_dim = parts.shape
    high, low = (torch.empty(parts.shape, dtype=torch.int8, device=parts.device) for _ in range(2))
    scale = torch.empty(parts.shape[:4], dtype=torch.float32, device=parts.device)
    bits, largest, least_exponent = limits
    with torch.cuda.device_of(parts):
        limb_rows[(triton.cdiv(blocks, _BLOCKS), PARTS, batch * heads)](
            parts, high, low, scale, *parts.stride(), heads, blocks,
            BITS=bits, LARGEST=largest, LEAST_EXPONENT=least_exponent, BLOCKS=_BLOCKS, HEAD_DIM=head_dim, num_warps=4,
        )  # fmt: skip
    return high, low, scale


@triton.jit(do_not_specialize=["heads", "blocks"])
def limb_rows(
    parts, high, low, scale, parts_batch, parts_head, parts_block, parts_part, parts_column, heads, blocks,
    BITS: tl.constexpr, LARGEST: tl.constexpr, LEAST_EXPONENT: tl.constexpr, BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Split part `program_id(1)` of `BLOCKS` blocks `program_id(0)` of head `program_id(2)`.

    parts: fp32 `[B, H, blocks, 4, D]`, `parts_batch`, … its strides; high, low: int8, contiguous, of its shape; scale: fp32,
    contiguous, one number a part.
    """
    pair, part, first = tl.program_id(2), tl.program_id(1), tl.program_id(0) * BLOCKS
    part_high, part_low, part_scale = load_limbs(
        parts + part * parts_part, pair // heads, pair % heads, first, blocks, parts_batch, parts_head, parts_block,
        parts_column, BITS, LARGEST, LEAST_EXPONENT, BLOCKS, HEAD_DIM,
    )  # fmt: skip
    block, column = first + tl.arange(0, BLOCKS), tl.arange(0, HEAD_DIM)
    row = (pair.to(tl.int64) * blocks + block) * 4 + part
    inside = block < blocks
    tl.store(high + row[:, None] * HEAD_DIM + column, part_high, mask=inside[:, None])
    tl.store(low + row[:, None] * HEAD_DIM + column, part_low, mask=inside[:, None])
    tl.store(scale + row, part_scale, mask=inside)


@triton.jit
def exact_exp2(x):
    """2^x for fp32 `x` up to 0, at least 2^-126: that of selection/exact_log2.py."""
    x = tl.maximum(x, _LEAST_POWER)
    whole = tl.floor(x)
    part = x - whole
    series = ((_E3 * part + _E2) * part + _E1) * part + _E0
    value = (part * (part - 1.0)) * series + (part + 1.0)
    return value * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exact_log2(x):
    """The binary logarithm of normal fp32 `x > 0`: that of selection/exact_log2.py."""
    bits = x.to(tl.int32, bitcast=True)
    part = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    series = ((((_L5 * part + _L4) * part + _L3) * part + _L2) * part + _L1) * part + _L0
    value = (part * (1.0 - part)) * series + part
    return value + ((bits >> 23) - 127).to(tl.float32)


@triton.jit
def log2_sum_of_four(first, second, third, fourth):
    """`log2(2^a + 2^b + 2^c + 2^d)`, of which the largest is finite: that of selection/exact_log2.py."""
    most = tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))
    lower = exact_exp2(first - most) + exact_exp2(second - most)
    upper = exact_exp2(third - most) + exact_exp2(fourth - most)
    return most + exact_log2(lower + upper)


@triton.jit
def _log_size(number, full, rest):
    """log2 of the relative size of part `number`: 0 up to `full`, then once `rest`, then nothing."""
    return tl.where(number < full, 0.0, tl.where(number == full, rest, float("-inf")))


@triton.jit
def _load_rows(high, low, scale, row, inside, HEAD_DIM: tl.constexpr):
    """What `limb_rows` stored of some parts, 0 where `inside` is false."""
    offsets = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
    part_high = tl.load(high + offsets, mask=inside[:, None], other=0)
    part_low = tl.load(low + offsets, mask=inside[:, None], other=0)
    return part_high, part_low, tl.load(scale + row, mask=inside, other=0.0)


@triton.jit
def _exponents(
    query_high, query_low, query_scale, key_high, key_low, key_scale, pair, block, part: tl.constexpr, columns, full,
    rest, factor, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Exponents of loaded query parts with part `part` of the key blocks `block`, whose size counts."""
    row = (pair.to(tl.int64) * columns + block) * 4 + part
    high, low, scale = _load_rows(key_high, key_low, key_scale, row, block < columns, HEAD_DIM)
    score = score_limbs(query_high, query_low, query_scale, high, low, scale)
    return score * factor + _log_size(block * 4 + part, full, rest)[None, :]


@triton.jit(do_not_specialize=["rows", "columns", "full"])
def mass_tiles(
    query_high, query_low, query_scale, key_high, key_low, key_scale, masses, rows, columns, full, rest, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """log2 of the mass that `ROWS` query parts `program_id(1)` give `COLUMNS` key blocks `program_id(0)` of head
    `program_id(2)`.

    query_x, key_x: as `limb_rows` stores them; masses: fp32, contiguous `[B * H, rows, columns]`.
    """
    pair = tl.program_id(2)
    row, block = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    query_row = pair.to(tl.int64) * rows + row
    high, low, scale = _load_rows(query_high, query_low, query_scale, query_row, row < rows, HEAD_DIM)
    # One part of all blocks a product: no tile is taken apart.
    mass = log2_sum_of_four(
        _exponents(
            high, low, scale, key_high, key_low, key_scale, pair, block, 0, columns, full, rest, factor, HEAD_DIM
        ),
        _exponents(
            high, low, scale, key_high, key_low, key_scale, pair, block, 1, columns, full, rest, factor, HEAD_DIM
        ),
        _exponents(
            high, low, scale, key_high, key_low, key_scale, pair, block, 2, columns, full, rest, factor, HEAD_DIM
        ),
        _exponents(
            high, low, scale, key_high, key_low, key_scale, pair, block, 3, columns, full, rest, factor, HEAD_DIM
        ),
    )
    inside = (row < rows)[:, None] & (block < columns)[None, :]
    tl.store(masses + query_row[:, None] * columns + block[None, :], mass, mask=inside)


@triton.jit
def _log_total(masses, columns, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """log2 of the sum of a query part's masses, given as log2 in `columns` consecutive numbers."""
    numbers = tl.arange(0, WIDTH)
    mosts = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, columns, WIDTH):
        mass = tl.load(masses + first + numbers, mask=first + numbers < columns, other=float("-inf"))
        mosts = tl.maximum(mosts, mass)
    most = tl.max(mosts, 0)
    sums = tl.zeros([WIDTH], tl.int32)
    for first in range(0, columns, WIDTH):
        inside = first + numbers < columns
        mass = tl.load(masses + first + numbers, mask=inside, other=float("-inf"))
        weight = round_scaled(exact_exp2(mass - most), 1.0 * (1 << BITS))
        sums += tl.where(inside, weight, 0)
    return most + (exact_log2(tl.sum(sums.to(tl.int64), 0).to(tl.float32)) - BITS)


@triton.jit(do_not_specialize=["rows", "columns", "full"])
def share_rows(masses, scores, rows, columns, full, rest, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The scores of query block `program_id(0)` of `[B * H * rows]` from the masses of its four parts.

    masses: fp32, contiguous `[B * H * rows, 4, columns]`; scores: fp32, contiguous `[B * H * rows, columns]`.
    """
    row = tl.program_id(0).to(tl.int64)
    first_mass = masses + row * 4 * columns
    second_mass, third_mass, fourth_mass = first_mass + columns, first_mass + columns * 2, first_mass + columns * 3
    first_total, second_total = (
        _log_total(first_mass, columns, BITS, WIDTH),
        _log_total(second_mass, columns, BITS, WIDTH),
    )
    third_total, fourth_total = (
        _log_total(third_mass, columns, BITS, WIDTH),
        _log_total(fourth_mass, columns, BITS, WIDTH),
    )

    part = tl.program_id(0) % rows * 4
    numbers = tl.arange(0, WIDTH)
    for first in range(0, columns, WIDTH):
        column = first + numbers
        inside = column < columns
        score = log2_sum_of_four(
            (tl.load(first_mass + column, mask=inside, other=0.0) - first_total) + _log_size(part, full, rest),
            (tl.load(second_mass + column, mask=inside, other=0.0) - second_total) + _log_size(part + 1, full, rest),
            (tl.load(third_mass + column, mask=inside, other=0.0) - third_total) + _log_size(part + 2, full, rest),
            (tl.load(fourth_mass + column, mask=inside, other=0.0) - fourth_total) + _log_size(part + 3, full, rest),
        )
        tl.store(scores + row * columns + column, score, mask=inside)
