"""Inputs on which the Triton and torch paths of selection and merge are compared."""

from __future__ import annotations

import torch
from torch import Tensor

# (queries, keys, static blocks a row at most, kept): one block, two, wide rows, more static blocks than are kept.
ROWS = [
    (1, 1, 1, 1), (3, 1, 0, 1), (3, 2, 1, 1), (4, 16, 3, 16), (5, 17, 9, 2), (4, 256, 20, 77), (3, 591, 5, 178),
    (3, 591, 300, 10), (2, 591, 591, 1), (2, 1000, 0, 999), (2, 1000, 40, 300), (2, 2100, 7, 100), (2, 4096, 9, 40),
    (1, 4097, 3, 700), (1, 7491, 9, 2248), (1, 16384, 2, 5000),
]  # fmt: skip

SCORES = ["random", "few", "equal", "extreme"]


def make_means(blocks: int, head_dim: int, seed: int, batch: int = 2, heads: int = 3) -> Tensor:
    """fp32 `[batch, heads, blocks, head_dim]`, not contiguous: ties in rounding, zeros, every exponent, infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, blocks, heads, head_dim, generator=generator)
    # Multiples of half a unit of 14 bits, so that rounding meets ties.
    x[:, :, 1] = torch.randint(-(1 << 15), 1 << 15, x[:, :, 1].shape, generator=generator) * 2.0**-15
    x[:, :, 1, 0] = 0.75
    # By one exponent a vector, from subnormal numbers to the largest; by one an entry in batch entry 0.
    exponents = torch.randint(-140, 127, x[:, :, 2].shape, generator=generator)
    exponents[1:] = exponents[1:, :, :1]
    x[:, :, 2] = torch.ldexp(x[:, :, 2].clamp(-1.9, 1.9), exponents)
    x[0, 0, 0] = 0.0
    x[0, -1, 0, 3] = float("inf")
    # Its largest rounds up to the power of two that bounds it.
    x[1, 0, 0, 1] = -torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
    return x.transpose(1, 2)


def make_parts(tokens: int, head_dim: int, seed: int) -> Tensor:
    """fp32 `[2, 2, N, 4, head_dim]` of blocks of 16, strided: parts alike, 300 times as large, tiny; 0 past the end."""
    blocks = -(-tokens // 16)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, blocks * 4, 2, head_dim, generator=generator)
    x[0, ::3, 0] *= 300
    x[1, :, 1, 5] *= 300
    x[1, 1::5, 0] = x[1, :1, 0]
    x[0, :, 1] *= 1e-20
    x[:, -(-tokens // 4) :] = 0.0
    return x.transpose(1, 2).unflatten(2, (blocks, 4))


def make_scores(kind: str, queries: int, keys: int, seed: int = 0) -> Tensor:
    """fp32 `[1, 2, queries, keys]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, queries, keys)
    if kind == "random":
        return torch.randn(shape, generator=generator)
    if kind == "few":
        return torch.tensor([-1.0, -0.0, 0.0, 2.5])[torch.randint(4, shape, generator=generator)]
    if kind == "equal":
        return torch.full(shape, -3.0)
    largest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    inf = float("inf")
    numbers = torch.tensor([-inf, inf, largest, -largest, tiny, -tiny, tiny / 2, -tiny / 2, 0.0, -0.0, 1.0])
    return numbers[torch.randint(len(numbers), shape, generator=generator)]


def make_static(queries: int, keys: int, most: int, seed: int = 0) -> Tensor:
    """bool `[queries, keys]` with up to `most` blocks a row, and that many in row 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        count = most if row == 0 else int(torch.randint(most + 1, (), generator=generator))
        rows[row, torch.randperm(keys, generator=generator)[:count]] = True
    return rows


def make_partials(head_dim: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, new_out, new_lse of 2 batch entries, 45 tokens, 3 heads; either side or both saw no key for some rows."""
    generator = torch.Generator().manual_seed(head_dim)
    outs = [torch.randn(2, 45, 3, head_dim, generator=generator) for _ in range(2)]
    lses = [torch.randn(2, 3, 45, generator=generator) * 20 for _ in range(2)]
    for out, lse, step in zip(outs, lses, (2, 3), strict=True):
        out[:, ::step] = 0.0
        lse[..., ::step] = float("-inf")
    return outs[0].to(dtypes[0]), lses[0], outs[1].to(dtypes[1]), lses[1]
