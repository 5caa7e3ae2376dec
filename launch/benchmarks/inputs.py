"""Random queries, keys and values in which neighbouring tokens are alike, so that the selection has something to select."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIKE = 100


def random_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of `shape` `[B, S, H, D]`."""
    batch, length, heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)

    def noise(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=dtype, device=device)

    common = noise(-(-length // _ALIKE)).repeat_interleave(_ALIKE, 1)[:, :length]
    return noise(length) + common, noise(length) + common, noise(length)
