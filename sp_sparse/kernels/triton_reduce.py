"""Triton code of the block means. This module imports triton; import it only where a kernel is launched."""
# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import triton
import triton.language as tl


@triton.jit
def _power_of_two(exponent):
    # Written as bits: exp2 may be off by a rounding.
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["length", "blocks", "last_bits"])
def mean_blocks(
    x, means, stride_batch, stride_token, stride_head, length, heads, blocks, last_bits, last_reciprocal,
    BLOCK: tl.constexpr, BITS: tl.constexpr, RECIPROCAL: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The mean of one block of one head: program `block * heads + head` of batch `program_id(1)`.

    x: `[B, S, H, D]`; means: fp32, contiguous `[B, H, N, D]`. A full block's values enter as integers of `BITS`
    bits and its sum is multiplied by `RECIPROCAL`; the last block, which may be short, has its own two.
    """
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    batch = tl.program_id(1).to(tl.int64)
    first = block * BLOCK
    tokens, columns = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    x += batch * stride_batch + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_token
    inside = (first + tokens < length)[:, None]
    tile = tl.load(x + tokens[:, None] * stride_token + columns, mask=inside, other=0.0).to(tl.float32)

    # frexp's exponent of the largest, 2^(e - 1) <= largest < 2^e. A largest of 0 has another one there, but sums to 0.
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126, -100)
    short = block == blocks - 1
    bits = tl.where(short, last_bits, BITS)
    # Adding 2^23 to a smaller number that is not negative rounds it, half to even, to an integer in its lowest bits.
    # The product is exact, so that fusing it with the addition changes nothing.
    biased = tl.abs(tile) * _power_of_two(bits - exponent) + 8388608.0
    fixed = biased.to(tl.int32, bitcast=True) - 0x4B000000
    total = tl.sum(tl.where(tile < 0, -fixed, fixed), 0)
    mean = total.to(tl.float32) * _power_of_two(exponent - bits) * tl.where(short, last_reciprocal, RECIPROCAL)
    tl.store(means + ((batch * heads + head) * blocks + block) * HEAD_DIM + columns, mean)
