"""The contract of a selector: which key blocks each query block attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sp_sparse.mask import BlockMask
from sp_sparse.selection.static import StaticBlocks
from sp_sparse.video import VideoGrid


@dataclass(frozen=True, eq=False)
class SelectionRequest:
    """What a mask is wanted for: the query blocks that a rank holds, over all key blocks of the sequence.

    Attributes:
        batch, heads: of the mask; the heads are those that the rank attends.
        query_range: first query token of the sequence that the rank holds, at a block edge, and the one after the last.
        key_length: tokens of the whole sequence.
        density: share of key blocks to keep, in (0, 1).
        static: the blocks that are to be kept whatever the selector thinks.
        grid: the video whose tokens the sequence holds, in the order that the configuration names.
    """

    batch: int
    heads: int
    query_range: tuple[int, int]
    key_length: int
    density: float
    static: StaticBlocks
    grid: VideoGrid

    @property
    def query_length(self) -> int:
        return self.query_range[1] - self.query_range[0]


class Selector(Protocol):
    """Chooses key blocks. Built as `Selector(config)`, with a `SparseAttentionConfig`, once a layer.

    It knows no ranks: summaries of shards are put together before it sees them, so every selector runs on every mesh. For
    masks that are bit-identical on every mesh the summary of a block may depend on nothing but the tokens of that block
    and head, to the last bit, whatever else the tensor holds; and so may the score of a pair on its two summaries. A
    floating-point sum does not: its order depends on shapes. Nothing may wait for the device.

    A configuration that the selector cannot serve is refused by its constructor with a ValueError.
    """

    def summarize_queries(self, query: Tensor) -> Tensor | None:
        """One summary a query block: `[B, S, H, D]` -> `[B, H, N, ...]`, or None if the selector looks at no tokens.

        The tokens start at a block edge; only the last block of the sequence may be short.
        """
        ...

    def summarize_keys(self, key: Tensor) -> Tensor | None:
        """Likewise of key blocks. What is returned travels to every rank that attends the same heads."""
        ...

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        """The mask `[batch, heads, Nq of query_range, Nk of the sequence]`, ascending, static blocks included.

        Args:
            queries: summaries of the query blocks of `request.query_range`.
            keys: summaries of all key blocks of the sequence.
            request: what is wanted.
        """
        ...
