"""Dense attention with its LSE, for the layers and steps that the schedule keeps dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sp_sparse.device import without_autocast
from sp_sparse.kernels.base import Kernel
from sp_sparse.mask import BlockMask

# Elements of the largest temporary on a device without a fused kernel that returns the LSE.
_BUDGET = 1 << 24


def attend_mask(
    kernel: Kernel, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of `kernel` under a mask, of torch's dense attention where there is none."""
    return dense_attention(query, key, value, scale) if mask is None else kernel(query, key, value, mask, scale)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over all keys: `[B, Sq, H, D]`, `[B, Sk, H, D]` -> out `[B, Sq, H, D]`, lse `[B, H, Sq]`.

    The LSE is in natural log, fp32 (fp64 for fp64 inputs). On CUDA in fp16 and bf16 it is the kernel of torch's own dense
    attention: cuDNN's where that runs, else FlashAttention-2. Elsewhere it computes slices of queries in fp32.
    """
    if key.shape[1] == 0:
        lse = query.new_full(
            (query.shape[0], query.shape[2], query.shape[1]), float("-inf"), dtype=_compute_dtype(query)
        )
        return torch.zeros_like(query), lse
    if query.numel() and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _fused(query, key, value, scale)
    with without_autocast(query.device):
        return _sliced(query, key, value, scale)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if _cudnn_runs(q, k, v):
        cudnn = _private("_scaled_dot_product_cudnn_attention")
        out, lse = cudnn(q, k, v, None, True, 0.0, False, False, scale=scale)[:2]
    else:
        flash = _private("_scaled_dot_product_flash_attention")
        out, lse = flash(q, k, v, 0.0, False, False, scale=scale)[:2]
    return out.transpose(1, 2), lse.reshape(lse.shape[0], lse.shape[1], -1)[:, :, : query.shape[1]]


def _private(name: str) -> Callable[..., Any]:
    """An operator that torch keeps to itself, and may rename: the public one returns no LSE."""
    if not hasattr(torch.ops.aten, name):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.ops.aten.{name}, by which dense layers and steps run; use a version "
            "that docs/compatibility.md names, or a schedule without dense layers and steps"
        )
    operator: Callable[..., Any] = getattr(torch.ops.aten, name)
    return operator


def _cudnn_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def _sliced(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).to(_compute_dtype(query)) for x in (query, key, value))
    rows = max(1, _BUDGET // max(1, k.shape[0] * k.shape[1] * k.shape[2]))
    outs, lses = [], []
    for part in (q * scale).split(rows, dim=2):
        scores = part @ k.transpose(2, 3)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse.unsqueeze(-1)).exp() @ v)
        lses.append(lse)
    return torch.cat(outs, 2).transpose(1, 2).to(query.dtype), torch.cat(lses, 2)


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
