"""`block_means` of remainder/means.py in Triton: keys and values are read once.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_sparse.mask import num_blocks

_BLOCK_SIZES = (16, 32, 64, 128)
_HEAD_DIMS = (64, 128)
_DTYPES = (torch.float16, torch.bfloat16)

# Programs of a launch, each of which sums a slope of its own: some for every multiprocessor.
_PROGRAMS = 512


def takes_tokens(key: Tensor, value: Tensor, block_size: int) -> bool:
    """Whether `block_means_triton` takes these `[B, S, H, D]` tensors in blocks of `block_size` tokens."""
    return (
        key.shape[3] in _HEAD_DIMS
        and block_size in _BLOCK_SIZES
        and key.dtype in _DTYPES
        and key.stride(3) == value.stride(3) == 1
    )


def block_means_triton(key: Tensor, value: Tensor, block_size: int, linear: bool) -> tuple[Tensor, Tensor | None]:
    """The mean tokens `[B, H, N, 2, D]` in the dtype of `key`, and the slope `[B, H, D, D]` in fp32 if `linear`.

    Sums are in fp32; keys less their mean are rounded to their dtype before they meet the values.
    """
    batch, length, heads, head_dim = key.shape
    blocks = num_blocks(length, block_size)
    tokens = torch.empty(batch, heads, blocks, 2, head_dim, dtype=key.dtype, device=key.device)
    chunks = min(blocks, triton.cdiv(_PROGRAMS, max(1, batch * heads)))
    slopes = torch.empty(
        batch, heads, chunks, head_dim if linear else 0, head_dim, dtype=torch.float32, device=key.device
    )
    if tokens.numel():
        with torch.cuda.device_of(key):
            # Heads change fastest: programs that run together then read whole tokens.
            mean_blocks[(heads, chunks, batch)](
                key, value, tokens, slopes, *key.stride()[:3], *value.stride()[:3], length, blocks,
                triton.cdiv(blocks, max(1, chunks)),
                LINEAR=linear, BLOCK=block_size, HEAD_DIM=head_dim, num_warps=8 if head_dim == 128 else 4,
            )  # fmt: skip
    return tokens, slopes.sum(2) if linear else None


@triton.jit(do_not_specialize=["length", "blocks", "share"])
def mean_blocks(
    key, value, tokens, slopes, key_batch, key_token, key_head, value_batch, value_token, value_head,
    length, blocks, share,
    LINEAR: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The blocks `[share * c, share * (c + 1))` of head `program_id(0)` of batch `program_id(2)`, `c` = `program_id(1)`.

    key, value: `[B, S, H, D]`, `x_batch`, … their strides; tokens: contiguous `[B, H, N, 2, D]`; slopes: contiguous
    `[B, H, chunks, D, D]`, of which this program writes one.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = batch.to(tl.int64) * tl.num_programs(0) + head
    key += batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    value += batch.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    tokens += lane * blocks * 2 * HEAD_DIM
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    slope = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    for block in range(share * chunk, tl.minimum(share * (chunk + 1), blocks)):
        first = block * BLOCK
        inside = (first + rows < length)[:, None]
        k_start, v_start = first.to(tl.int64) * key_token, first.to(tl.int64) * value_token
        k = tl.load(key + k_start + rows[:, None] * key_token + columns, mask=inside, other=0.0)
        v = tl.load(value + v_start + rows[:, None] * value_token + columns, mask=inside, other=0.0)
        count = tl.minimum(length - first, BLOCK).to(tl.float32)
        k_mean = tl.sum(k.to(tl.float32), 0) / count
        v_mean = tl.sum(v.to(tl.float32), 0) / count
        mean = tokens + block * 2 * HEAD_DIM + columns
        tl.store(mean, k_mean.to(tokens.dtype.element_ty))
        tl.store(mean + HEAD_DIM, v_mean.to(tokens.dtype.element_ty))
        if LINEAR:
            # Padding adds nothing: its values are 0.
            centred = (k.to(tl.float32) - k_mean[None, :]).to(v.dtype)
            slope = tl.dot(centred.T, v, slope)
    if LINEAR:
        entry = slopes + (lane * tl.num_programs(1) + chunk) * HEAD_DIM * HEAD_DIM
        tl.store(entry + columns[:, None] * HEAD_DIM + columns, slope)
