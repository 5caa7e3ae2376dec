"""Blocks that are kept whatever the scores say: diagonal, window, first frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sp_sparse.mask import BlockMask, num_blocks


@dataclass(frozen=True, eq=False)
class StaticBlocks:
    """The always-kept key blocks of one ring shard's query blocks.

    Attributes:
        rows: bool `[Nq, Nk]`, on the device.
        counts: int32 `[Nq]`, kept blocks a row, on the device.
        most: the largest of the counts, on the host.
    """

    rows: Tensor
    counts: Tensor
    most: int

    @classmethod
    def of(cls, rows: NDArray[np.bool_], device: torch.device) -> StaticBlocks:
        counts = rows.sum(1, dtype=np.int32)
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(counts).to(device), int(counts.max(initial=0)))


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


def select_static(
    static: StaticBlocks, batch: int, heads: int, block_size: tuple[int, int], query_length: int, key_length: int
) -> BlockMask:
    """The mask that keeps the static blocks and nothing else, for every head alike."""
    dense = static.rows.expand(batch, heads, *static.rows.shape)
    return BlockMask.from_dense(dense, block_size, query_length, key_length)
