"""Random inputs that the tests share: asymmetric masks with empty rows, scaled q and k, poisoned table tails."""

from __future__ import annotations

import torch
from torch import Tensor

from sp_sparse import BlockMask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(shape: tuple[int, int, int, int], seed: int, density: float = 0.35) -> Tensor:
    """bool `[B, H, Nq, Nk]`: asymmetric; every fifth row selects nothing and every seventh (from 2) everything."""
    blocks = torch.rand(shape, generator=seeded(seed)) < density
    blocks[:, :, 2::7] = True
    blocks[:, :, 1::5] = False
    return blocks


def random_tensors(
    batch: int, query_length: int, key_length: int, heads: int, head_dim: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in `dtype`, with q and k three times normal: attention is far from uniform."""
    generator = seeded(seed)
    q = torch.randn(batch, query_length, heads, head_dim, generator=generator, dtype=torch.float64) * 3
    k, v = (torch.randn(batch, key_length, heads, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), (k * 3).to(dtype), v.to(dtype)


def poisoned(mask: BlockMask, seed: int) -> BlockMask:
    """The same mask, with random block numbers in the table entries past `counts`."""
    noise = torch.randint(
        max(mask.num_key_blocks, 1), mask.indices.shape, generator=seeded(seed), dtype=mask.indices.dtype
    )
    used = torch.arange(mask.indices.shape[3]) < mask.counts.unsqueeze(-1)
    indices = torch.where(used, mask.indices, noise)
    return BlockMask(indices, mask.counts, mask.block_size, mask.query_length, mask.key_length)


def narrowed(mask: BlockMask) -> BlockMask:
    """The same mask with the narrowest table that holds it."""
    width = int(mask.counts.max()) if mask.counts.numel() else 0
    return BlockMask(mask.indices[..., :width], mask.counts, mask.block_size, mask.query_length, mask.key_length)
