"""Dense attention by other hands, on one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (query, key, value), each `[B, S, H, D]` -> anything
Dense = Callable[[Tensor, Tensor, Tensor], object]


def dense_baselines(device: torch.device) -> dict[str, Dense]:
    """Those that run here by name, the one that speed-ups are against first."""
    if device.type != "cuda":
        return {"sdpa_dense": _sdpa}
    found: dict[str, Dense] = {"cudnn_dense": _cudnn}
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return found
    # In a function of its own: its further arguments are not those of the others.
    found["fa4_dense"] = lambda query, key, value: flash_attn_func(query, key, value)
    return found


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
