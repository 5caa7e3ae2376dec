"""The oracle: dense attention in float64 under the expanded block mask, written without anything from sp_sparse."""

from __future__ import annotations

import torch
from torch import Tensor


def expand(blocks: Tensor, block_size: tuple[int, int], query_length: int, key_length: int) -> Tensor:
    """bool `[B, H, Nq, Nk]` over blocks -> bool `[B, H, Sq, Sk]` over tokens."""
    tokens = blocks.repeat_interleave(block_size[0], 2)[:, :, :query_length]
    return tokens.repeat_interleave(block_size[1], 3)[..., :key_length]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """`[B, S, H, D]` under a token mask `[B, H, Sq, Sk]` -> out `[B, Sq, H, D]`, lse `[B, H, Sq]`, both in `dtype`."""
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    weights = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt().clamp(min=1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, reference_error: float, factor: float = 2.0) -> None:
    """The error is at most `factor` times that of the same-precision reference (and NaN never passes)."""
    error = relative_error(actual, expected)
    assert error <= factor * reference_error, f"relative error {error:.3e} > {factor} x {reference_error:.3e}"


def block_rows(first: int, last: int, block: int) -> slice:
    """The mask rows of the query tokens `[first, last)`, of which `first` starts a block unless the range is empty."""
    return slice(first // block, -(-last // block) if last > first else first // block)
