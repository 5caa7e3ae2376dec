"""Subblock selection: the key blocks that get most of a query block's attention, as the means of their parts tell."""

from __future__ import annotations

from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import BlockMask
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.subblock_scores import PARTS, part_means, part_sizes, subblock_scores
from sp_sparse.selection.topk import select_in_slices


class SubblockSelector:
    """Scores a pair of blocks by the attention that the parts of one give those of the other, and keeps the highest.

    A block's summary is the mean token of each quarter of it. A key block's mass for a query part is a sum of exponentials
    over the four key parts; its score is the mean over the four query parts of its share of all mass, see
    selection/subblock_scores.py. Attention is taken to scale products by `D ** -0.5`. Log-sum-exp scores of sub-blocks are
    in sglang's sparse attention for diffusion models; the shares and the exact arithmetic are ours.
    """

    def __init__(self, config: SparseAttentionConfig) -> None:
        query, key = config.block_size
        if query % PARTS or key % PARTS:
            down, up = (
                f"{query - query % PARTS}x{key - key % PARTS}",
                f"{query + -query % PARTS}x{key + -key % PARTS}",
            )
            raise ValueError(
                f"selector 'subblock' cuts blocks into {PARTS} parts, but block_size is {query}x{key}; use {down} or {up}, "
                "or selector 'topk'"
            )
        self._block_size = config.block_size

    def summarize_queries(self, query: Tensor) -> Tensor:
        return part_means(query, self._block_size[0])

    def summarize_keys(self, key: Tensor) -> Tensor:
        return part_means(key, self._block_size[1])

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        assert queries is not None, "made by summarize_queries"
        assert keys is not None, "made by summarize_keys"
        query_block, key_block = self._block_size
        key_sizes = part_sizes(request.key_length, key_block)
        full, rest = part_sizes(request.query_length, query_block)

        def scores(rows: slice) -> Tensor:
            first = PARTS * (rows.start or 0)
            return subblock_scores(queries[:, :, rows], keys, (max(0, full - first), rest), key_sizes)

        return select_in_slices(scores, self._block_size, request, PARTS)
