"""`merge` of parallel/merge.py in Triton: both outputs are read once and the merged one is written once.

This module imports triton; import it only where it is launched.
"""

# mypy: allow-untyped-defs
# Triton's parameters have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_DIMS = (32, 64, 128, 256)

_TOKENS = 32


def merge_triton(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The merged out in `dtype`, which is `out` overwritten if that has it, and the merged lse.

    Args:
        out, new_out: `[B, S, H, D]`, the last dimension contiguous and one of `HEAD_DIMS`.
        lse, new_lse: fp32 `[B, H, S]`.
    """
    merged = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
    batch, length, heads, head_dim = out.shape
    # Not in place: the warps of a program may read the same entry, one of them after another has written it.
    total = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    if out.numel():
        with torch.cuda.device_of(out):
            # Heads change fastest: programs that run together then read whole tokens.
            merge_tokens[(heads, triton.cdiv(length, _TOKENS), batch)](
                out, lse, new_out, new_lse, merged, total, *out.stride()[:3], *new_out.stride()[:3],
                *merged.stride()[:3], *lse.stride(), *new_lse.stride(), length,
                TOKENS=_TOKENS, HEAD_DIM=head_dim, num_warps=4,
            )  # fmt: skip
    return merged, total


@triton.jit(do_not_specialize=["length"])
def merge_tokens(
    out, lse, new_out, new_lse, merged, merged_lse, out_batch, out_token, out_head, new_batch, new_token, new_head,
    merged_batch, merged_token, merged_head, lse_batch, lse_head, lse_token,
    new_lse_batch, new_lse_head, new_lse_token, length,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Merge `TOKENS` tokens `program_id(1)` of head `program_id(0)` of batch `program_id(2)`.

    `merged` may be `out`; `merged_lse` is contiguous; `x_batch`, … are strides.
    """
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < length
    lse += batch * lse_batch + head * lse_head + tokens * lse_token
    new_lse += batch * new_lse_batch + head * new_lse_head + tokens * new_lse_token
    old = tl.load(lse, mask=inside, other=float("-inf"))
    new = tl.load(new_lse, mask=inside, other=float("-inf"))
    top = tl.maximum(old, new)
    # exp(-inf - finite) = 0 is right; only (-inf) - (-inf) is NaN, where neither side saw a key.
    floor = tl.where(top == float("-inf"), 0.0, top)
    total = floor + tl.log(tl.exp(old - floor) + tl.exp(new - floor))
    floor = tl.where(total == float("-inf"), 0.0, total)
    weight, new_weight = tl.exp(old - floor), tl.exp(new - floor)

    columns = tl.arange(0, HEAD_DIM)
    out += batch * out_batch + head * out_head + tokens[:, None] * out_token + columns
    new_out += batch * new_batch + head * new_head + tokens[:, None] * new_token + columns
    merged += batch * merged_batch + head * merged_head + tokens[:, None] * merged_token + columns
    ours = tl.load(out, mask=inside[:, None], other=0.0).to(tl.float32)
    theirs = tl.load(new_out, mask=inside[:, None], other=0.0).to(tl.float32)
    result = ours * weight[:, None] + theirs * new_weight[:, None]
    tl.store(merged, result.to(merged.dtype.element_ty), mask=inside[:, None])
    merged_lse += (batch * tl.num_programs(0) + head) * length + tokens
    tl.store(merged_lse, total, mask=inside)
