"""Top-k selection: the key blocks with the highest scores of mean-pooled queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.device import triton_runs_on
from sp_sparse.mask import BlockMask
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.static import StaticBlocks
from sp_sparse.selection.summaries import block_means, block_scores

# Scores held at a time, 256 MB of fp32: bounds the memory of a selection beside its mask.
_BUDGET = 1 << 26


class TopKSelector:
    """Scores a pair of blocks by the product of their mean tokens (the coarse stage of Video Sparse Attention,
    arXiv 2505.13389), here in exact arithmetic, and keeps the highest."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        self._block_size = config.block_size

    def summarize_queries(self, query: Tensor) -> Tensor:
        return block_means(query, self._block_size[0])

    def summarize_keys(self, key: Tensor) -> Tensor:
        return block_means(key, self._block_size[1])

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        assert queries is not None, "made by summarize_queries"
        assert keys is not None, "made by summarize_keys"
        return select_in_slices(lambda rows: block_scores(queries[:, :, rows], keys), self._block_size, request)


def select_in_slices(
    scores: Callable[[slice], Tensor], block_size: tuple[int, int], request: SelectionRequest, numbers: int = 1
) -> BlockMask:
    """`select_topk` of scores that are made for some query blocks at a time, so that memory stays bounded.

    Args:
        scores: fp32 `[B, H, rows, Nk]` without NaN of a slice of the query blocks.
        block_size: (query block, key block) in tokens.
        request: what is wanted.
        numbers: fp32 numbers that making a score holds.
    """
    static, batch, heads = request.static, request.batch, request.heads
    rows, columns = static.rows.shape
    keep, width = _row_sizes(request.density, columns, static)
    step = max(1, _BUDGET // max(1, batch * heads * columns * numbers))
    if step >= rows:
        indices, counts = _select_rows(scores(slice(None)), static.rows, static.counts, keep, width)
    else:
        indices = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=static.rows.device)
        counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=static.rows.device)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            chosen = _select_rows(scores(part), static.rows[part], static.counts[part], keep, width)
            indices[:, :, part], counts[:, :, part] = chosen
    return BlockMask(indices, counts, block_size, request.query_length, request.key_length)


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
        scores: fp32 `[B, H, Nq, Nk]` without NaN (see `block_scores`).
        static: blocks that are always kept.
        density: share of key blocks to keep, in (0, 1].
        block_size: (query block, key block) in tokens.
        query_length, key_length: tokens.
    """
    keep, width = _row_sizes(density, scores.shape[-1], static)
    indices, counts = _select_rows(scores, static.rows, static.counts, keep, width)
    return BlockMask(indices, counts, block_size, query_length, key_length)


def _row_sizes(density: float, num_key_blocks: int, static: StaticBlocks) -> tuple[int, int]:
    """Blocks of a row unless more are static, and the most blocks of any row."""
    keep = blocks_kept(density, num_key_blocks)
    return keep, max(keep, static.most)


def _select_rows(scores: Tensor, static: Tensor, static_counts: Tensor, keep: int, width: int) -> tuple[Tensor, Tensor]:
    if triton_runs_on(scores.device):
        from sp_sparse.selection.triton_topk import MOST_BLOCKS, select_rows_triton

        if 0 < scores.shape[-1] <= MOST_BLOCKS:
            return select_rows_triton(scores, static, static_counts, keep, width)
    return select_rows_torch(scores, static, static_counts, keep, width)


def select_rows_torch(
    scores: Tensor, static: Tensor, static_counts: Tensor, keep: int, width: int
) -> tuple[Tensor, Tensor]:
    """The table of `select_topk` in plain torch: indices `[B, H, Nq, width]` and counts `[B, H, Nq]`, int32.

    Args:
        scores: fp32 `[B, H, Nq, Nk]`.
        static: bool `[Nq, Nk]`.
        static_counts: int32 `[Nq]`, static blocks a row.
        keep: blocks of a row unless more are static.
        width: the most blocks of any row.
    """
    num_keys = scores.shape[-1]
    keys = torch.where(static, torch.iinfo(torch.int64).max, _distinct_keys(scores))
    chosen = keys.topk(width, dim=-1, sorted=width > keep).indices
    counts = static_counts.clamp(min=keep).expand(scores.shape[:-1])
    if width > keep:
        slots = torch.arange(width, device=scores.device)
        chosen = torch.where(slots < counts.unsqueeze(-1), chosen, num_keys)
    indices = chosen.sort(dim=-1).values.clamp_(max=max(num_keys - 1, 0)).to(torch.int32)
    return indices, counts.contiguous()


def _distinct_keys(scores: Tensor) -> Tensor:
    """int64 keys ordered as the scores are, with the lower block number winning a tie.

    The bits of a float order as integers once those of negative numbers are flipped; with the block number below them no
    two keys of a row are equal, so the result of a top-k is unique.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one number
    bits = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    return (bits.long() << 32) - numbers
