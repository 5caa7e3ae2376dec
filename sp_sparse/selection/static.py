"""Blocks that are kept whatever the scores say: diagonal, window, first frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import num_blocks
from sp_sparse.recent import Recent
from sp_sparse.video import VideoGrid, token_order


@dataclass(frozen=True, eq=False)
class StaticBlocks:
    """The always-kept key blocks of one ring shard's query blocks.

    Attributes:
        rows: bool `[Nq, Nk]`, on the device.
        indices: int32 `[Nq, most]`, the numbers of the kept blocks of each row, ascending; what follows them is 0.
        counts: int32 `[Nq]`, kept blocks a row, on the device.
        most: the largest of the counts, on the host.
    """

    rows: Tensor
    indices: Tensor
    counts: Tensor
    most: int

    @classmethod
    def of(cls, rows: NDArray[np.bool_], device: torch.device) -> StaticBlocks:
        counts = rows.sum(1, dtype=np.int32)
        most = int(counts.max(initial=0))
        row, column = rows.nonzero()
        indices = np.zeros((len(rows), most), dtype=np.int32)
        indices[row, np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)] = column
        kept, numbers, totals = (torch.from_numpy(x).to(device) for x in (rows, indices, counts))
        return cls(kept, numbers, totals, most)


def static_rows(
    length: int,
    block_size: tuple[int, int],
    query_range: tuple[int, int],
    *,
    keep_diagonal: bool,
    window: int,
    first_frame: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """The kept key blocks of the query blocks in a range of tokens, bool `[Nq, Nk]`.

    Args:
        length: tokens of the whole sequence.
        block_size: (query block, key block) in tokens.
        query_range: first query token, a multiple of the query block, and the one after the last.
        keep_diagonal: keep the key blocks that overlap the query block's own tokens.
        window: keep this many more key blocks on either side of those.
        first_frame: for each token of the sequence whether it lies in the first frame, `[S]`; None keeps none for that.
    """
    query_block, key_block = block_size
    starts = np.arange(query_range[0], query_range[1], query_block)[:, None]
    ends = np.minimum(starts + query_block, query_range[1])
    keys = np.arange(num_blocks(length, key_block))[None, :]
    rows = np.zeros((len(starts), keys.shape[1]), dtype=np.bool_)
    if keep_diagonal:
        rows |= (keys >= starts // key_block - window) & (keys <= (ends - 1) // key_block + window)
    if first_frame is not None:
        rows |= np.logical_or.reduceat(first_frame, np.arange(0, length, key_block))
    return rows


class StaticPlans:
    """The always-kept blocks of the videos that were seen last, one plan for all layers that share it.

    A plan at 720p holds 0.35 MB a ring shard, at 1080p and 241 frames 56 MB.
    """

    def __init__(self, config: SparseAttentionConfig, most: int = 4) -> None:
        self._config = config
        self._plans: Recent[tuple[VideoGrid, tuple[int, int], torch.device], StaticBlocks] = Recent(most)

    def blocks(self, grid: VideoGrid, query_range: tuple[int, int], device: torch.device) -> StaticBlocks:
        """Those of the query blocks in a range of tokens of `grid`; planned once, then they stay on the device."""
        return self._plans.get((grid, query_range, device), lambda: self._plan(grid, query_range, device))

    def _plan(self, grid: VideoGrid, query_range: tuple[int, int], device: torch.device) -> StaticBlocks:
        config, first_frame = self._config, None
        if config.keep_first_frame:
            first_frame = token_order(grid, config.token_order) < grid.height * grid.width
        rows = static_rows(
            grid.num_tokens,
            config.block_size,
            query_range,
            keep_diagonal=config.keep_diagonal,
            window=config.window,
            first_frame=first_frame,
        )
        return StaticBlocks.of(rows, device)
