"""`block_means` of selection/summaries.py in Triton: one pass over the tokens, the same bits as in torch.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.mask import num_blocks

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_HEAD_DIMS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Bits of a value in fixed point: 256 such integers sum to less than 2^31.
_BITS = 22


def takes_tokens(x: Tensor, block_size: int) -> bool:
    """Whether `block_means_triton` takes `x`, `[B, S, H, D]`, in blocks of `block_size` tokens."""
    return x.shape[3] in _HEAD_DIMS and block_size in _BLOCK_SIZES and x.dtype in _DTYPES and x.stride(3) == 1


def block_means_triton(x: Tensor, block_size: int) -> Tensor:
    """The mean token of every block and head: `[B, S, H, D]` fp16, bf16 or fp32 -> fp32 `[B, H, N, D]`.

    Bit for bit what `block_means_torch` returns: sums of fixed-point integers have one value in any order.
    """
    batch, length, heads, head_dim = x.shape
    blocks = num_blocks(length, block_size)
    means = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    if means.numel() == 0:
        return means

    last = length - (blocks - 1) * block_size
    with torch.cuda.device_of(x):
        # Heads change fastest: programs that run together then read whole tokens.
        mean_blocks[(heads * blocks, batch)](
            x, means, *x.stride()[:3], length, heads, blocks, 1 / last,
            BLOCK=block_size, BITS=_BITS, RECIPROCAL=1 / block_size, HEAD_DIM=head_dim,
            num_warps=max(1, block_size * head_dim // 2048), enable_fp_fusion=True,
        )  # fmt: skip
    return means


@triton.jit
def power_of_two(exponent):
    """2 to an integer power as fp32; its bits are written, as exp2 may be off by a rounding."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def frexp_exponent(x):
    """frexp's exponent `e` of a normal `x > 0`, 2^(e - 1) <= x < 2^e; some e <= -126 for 0 and subnormal numbers."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def round_scaled(x, scale):
    """`x * scale` rounded half to even to int32, for magnitudes up to 2^22 and `scale` a power of two.

    At 1.5 * 2^23 neighbouring floats are 1 apart, so adding it rounds and leaves the integer in the lowest bits. The
    product is exact, so that fusing it with the addition changes nothing.
    """
    return (x * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit(do_not_specialize=["length", "blocks"])
def mean_blocks(
    x, means, stride_batch, stride_token, stride_head, length, heads, blocks, last_reciprocal,
    BLOCK: tl.constexpr, BITS: tl.constexpr, RECIPROCAL: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The mean of one block of one head: program `block * heads + head` of batch `program_id(1)`.

    x: `[B, S, H, D]`; means: fp32, contiguous `[B, H, N, D]`. Values enter as integers of `BITS` bits; the sum is
    multiplied by `RECIPROCAL`, that of the last block, which may be short, by `last_reciprocal`.
    """
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    batch = tl.program_id(1).to(tl.int64)
    first = block * BLOCK
    tokens, columns = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    x += batch * stride_batch + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride_token
    inside = (first + tokens < length)[:, None]
    tile = tl.load(x + tokens[:, None] * stride_token + columns, mask=inside, other=0.0).to(tl.float32)

    # Over the flat tile: reduced along columns first, every row would take a round of shuffles.
    exponent = tl.maximum(frexp_exponent(tl.max(tl.abs(tile))), -100)
    total = tl.sum(round_scaled(tile, power_of_two(BITS - exponent)), 0)
    reciprocal = tl.where(block == blocks - 1, last_reciprocal, RECIPROCAL)
    mean = total.to(tl.float32) * power_of_two(exponent - BITS) * reciprocal
    tl.store(means + ((batch * heads + head) * blocks + block) * HEAD_DIM + columns, mean)
