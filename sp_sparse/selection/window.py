"""Window selection: the static blocks and nothing else, so that no token is looked at."""

from __future__ import annotations

from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import BlockMask
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.static import StaticBlocks


class WindowSelector:
    """Keeps the diagonal, with `window` blocks on either side, and the first frame if asked; density does not count."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        if not config.keep_diagonal:
            raise ValueError("selector 'window' without keep_diagonal could keep nothing; leave keep_diagonal on")
        self._block_size = config.block_size

    def summarize_queries(self, query: Tensor) -> None:
        return None

    def summarize_keys(self, key: Tensor) -> None:
        return None

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        return select_static(
            request.static,
            request.batch,
            request.heads,
            self._block_size,
            request.query_length,
            request.key_length,
        )


def select_static(
    static: StaticBlocks, batch: int, heads: int, block_size: tuple[int, int], query_length: int, key_length: int
) -> BlockMask:
    """The mask that keeps the static blocks and nothing else, for every head alike."""
    indices = static.indices.expand(batch, heads, *static.indices.shape).contiguous()
    counts = static.counts.expand(batch, heads, *static.counts.shape).contiguous()
    return BlockMask(indices, counts, block_size, query_length, key_length)
