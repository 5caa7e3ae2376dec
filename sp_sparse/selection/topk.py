"""Top-k selection: the key blocks with the highest scores of mean-pooled queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sp_sparse.mask import BlockMask
from sp_sparse.selection.static import StaticBlocks


def blocks_kept(density: float, num_key_blocks: int) -> int:
    """How many key blocks a share in (0, 1] is: rounded up, at least one."""
    return min(num_key_blocks, max(1, math.ceil(density * num_key_blocks - 1e-9)))


def select_topk(
    scores: Tensor,
    static: StaticBlocks,
    density: float,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
) -> BlockMask:
    """Keep the static blocks, then the highest scores, up to the share `density` of the key blocks.

    A row with more static blocks than that keeps all of them. Ties go to the lower block number. No synchronisation.

    Args:
        scores: float64 `[B, H, Nq, Nk]`, exact (see `block_scores`).
        static: blocks that are always kept.
        density: share of key blocks to keep, in (0, 1].
        block_size: (query block, key block) in tokens.
        query_length, key_length: tokens.
    """
    num_keys = scores.shape[-1]
    keep = blocks_kept(density, num_keys)
    width = max(keep, static.most)
    keys = _distinct_keys(scores)
    first = torch.iinfo(torch.int64).max - torch.arange(num_keys, device=scores.device)
    keys = torch.where(static.rows, first, keys)
    chosen = keys.topk(width, dim=-1, sorted=width > keep).indices
    counts = static.counts.clamp(min=keep).expand(scores.shape[:-1])
    if width > keep:
        slots = torch.arange(width, device=scores.device)
        chosen = torch.where(slots < counts.unsqueeze(-1), chosen, num_keys)
    indices = chosen.sort(dim=-1).values.clamp_(max=max(num_keys - 1, 0)).to(torch.int32)
    return BlockMask(indices, counts.contiguous(), block_size, query_length, key_length)


def _distinct_keys(scores: Tensor) -> Tensor:
    """int64 keys ordered as the scores are, with the lower block number winning a tie.

    The bits of a double order as integers once negative numbers are flipped; the lowest bits then give way to the block
    number, so no two keys of a row are equal and the result of a top-k is unique.
    """
    num_keys = scores.shape[-1]
    spare = (1 << max(num_keys - 1, 1).bit_length()) - 1
    bits = (scores + 0.0).view(torch.int64)  # + 0.0 makes -0.0 and 0.0 one number
    bits = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)
    return (bits & ~spare) | (spare - torch.arange(num_keys, device=scores.device))
