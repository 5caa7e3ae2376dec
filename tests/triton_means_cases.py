"""Token tensors on which block means are compared bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

# (block size, head dimension, tokens): whole blocks, short last blocks, one short block.
CASES = [(16, 64, 100), (32, 128, 90), (64, 64, 192), (64, 128, 333), (128, 128, 300), (128, 64, 5), (256, 128, 300)]


def make_tokens(length: int, head_dim: int, dtype: torch.dtype, heads: int = 5) -> Tensor:
    """`[2, length, heads, head_dim]` with large, small, tied, subnormal and zero values, not contiguous."""
    generator = torch.Generator().manual_seed(length + head_dim)
    shape = (2, length, heads, head_dim)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-9, 9, shape, generator=generator).float())
    # Head 1: multiples of half a unit in the last place of the fixed point, so that rounding meets ties.
    x[:, :, 1] = torch.randint(-(1 << 9), 1 << 9, shape[:2] + shape[3:], generator=generator) * 2.0**-23
    x[:, 0, 1, 0] = 0.75
    x[:, :, 2] *= torch.finfo(dtype).smallest_normal
    x[:, :, 3] = -0.0
    return torch.stack((x, x), 3).to(dtype)[:, :, :, 1]
