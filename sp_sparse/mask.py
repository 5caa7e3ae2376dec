"""Which (query block, key block) pairs are attended: the block mask.

Shape letters used in this package: B batch, H heads, S tokens, D head dimension, N blocks, K table width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on


def num_blocks(length: int, block_size: int) -> int:
    """Number of blocks that cover `length` tokens; only the last one may be short."""
    return -(-length // block_size)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """For every (batch, head, query block), the ascending list of key blocks that it attends.

    Query block `i` covers query tokens `[i * block_size[0], (i + 1) * block_size[0])`, key block `j` likewise with
    `block_size[1]`; only the last block of each may be short. Nothing here synchronises with the device.

    Attributes:
        indices: int32 `[B, H, Nq, K]`. The first `counts` entries of a row are key block numbers in ascending order;
            the entries after them are unspecified numbers in `[0, Nk)` that a kernel may load but must not use.
        counts: int32 `[B, H, Nq]`, attended key blocks a row; 0 means that the row attends nothing.
        block_size: tokens of a (query block, key block).
        query_length: query tokens `Sq`.
        key_length: key tokens `Sk`.
    """

    indices: Tensor
    counts: Tensor
    block_size: tuple[int, int]
    query_length: int
    key_length: int

    def __post_init__(self) -> None:
        if min(self.block_size) < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise TypeError(
                f"indices and counts must be int32, got {self.indices.dtype} and {self.counts.dtype}; convert with .int()"
            )
        rows = tuple(self.counts.shape)
        if self.indices.ndim != 4 or tuple(self.indices.shape[:3]) != rows:
            raise ValueError(
                f"indices {tuple(self.indices.shape)} and counts {rows} disagree; expected [B, H, Nq, K] and [B, H, Nq]"
            )
        if rows[2] != self.num_query_blocks:
            raise ValueError(
                f"{rows[2]} mask rows do not cover {self.query_length} query tokens in blocks of {self.block_size[0]}; "
                f"expected {self.num_query_blocks} rows"
            )
        if self.indices.shape[3] > self.num_key_blocks:
            raise ValueError(
                f"table width {self.indices.shape[3]} exceeds the {self.num_key_blocks} key blocks; drop the extra columns"
            )

    @property
    def num_query_blocks(self) -> int:
        return num_blocks(self.query_length, self.block_size[0])

    @property
    def num_key_blocks(self) -> int:
        return num_blocks(self.key_length, self.block_size[1])

    @property
    def last_key_tokens(self) -> int:
        """Tokens of the last key block, which may be short; there must be one."""
        return self.key_length - (self.num_key_blocks - 1) * self.block_size[1]

    @classmethod
    def from_dense(cls, dense: Tensor, block_size: tuple[int, int], query_length: int, key_length: int) -> BlockMask:
        """Build from a bool mask over blocks, `[B, H, Nq, Nk]`."""
        width = dense.shape[-1]
        counts = dense.sum(-1, dtype=torch.int32)
        # Each kept column goes to its rank among the kept ones; the others go to one spare column that is cut off.
        position = torch.where(dense, dense.cumsum(-1) - 1, width)
        columns = torch.arange(width, dtype=torch.int32, device=dense.device).expand(dense.shape)
        indices = torch.zeros(*dense.shape[:-1], width + 1, dtype=torch.int32, device=dense.device)
        indices.scatter_(-1, position, columns)
        return cls(indices[..., :width], counts, block_size, query_length, key_length)

    @classmethod
    def join_heads(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """The mask of the heads of several masks, alike in everything else."""
        if len(masks) == 1:
            return masks[0]
        indices, counts = (torch.cat([getattr(mask, name) for mask in masks], dim=1) for name in ("indices", "counts"))
        return replace(masks[0], indices=indices, counts=counts)

    def to_dense(self) -> Tensor:
        """The bool mask over blocks, `[B, H, Nq, Nk]`."""
        spare = self.num_key_blocks
        dense = torch.zeros(*self.counts.shape, spare + 1, dtype=torch.bool, device=self.indices.device)
        columns = torch.where(self._used(), self.indices, spare).long()
        return dense.scatter_(-1, columns, True)[..., :spare]

    def query_rows(self, first: int, last: int) -> BlockMask:
        """The mask of the query blocks `[first, last)` alone."""
        size = self.block_size[0]
        length = min(last * size, self.query_length) - first * size
        return replace(
            self, indices=self.indices[:, :, first:last], counts=self.counts[:, :, first:last], query_length=length
        )

    def split_keys(self, edges: Sequence[int]) -> tuple[BlockMask, ...]:
        """Cut into the masks of consecutive key ranges, in one pass over the table.

        Args:
            edges: ascending token positions, the first 0 and the last `key_length`; all but the last are multiples of
                the key block size. Range `i` is `[edges[i], edges[i + 1])` and may be empty.

        Returns:
            One mask a range, its indices counted from the start of the range; a row's count may be 0.
        """
        size = self.block_size[1]
        if edges[0] != 0 or edges[-1] != self.key_length or any(e % size for e in edges[:-1] if e != self.key_length):
            raise ValueError(
                f"key edges {tuple(edges)} do not cut {self.key_length} tokens at multiples of {size}; "
                "align the shards to block edges first"
            )
        tables = self._split_tables([num_blocks(edge, size) for edge in edges])
        lengths = [stop - start for start, stop in zip(edges[:-1], edges[1:], strict=True)]
        return tuple(
            BlockMask(indices, counts, self.block_size, self.query_length, length)
            for (indices, counts), length in zip(tables, lengths, strict=True)
        )

    def _split_tables(self, edges: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The (indices, counts) of consecutive ranges of key blocks."""
        if triton_runs_on(self.indices.device):
            from sp_sparse.triton_split import MOST_SLOTS, split_rows_triton

            if 0 < self.indices.shape[3] <= MOST_SLOTS:
                return split_rows_triton(self.indices, self.counts, edges)
        ordered = torch.where(self._used(), self.indices, self.num_key_blocks)
        # A row is ascending, so what lies in a range is one run: count what lies before each edge.
        begins = [torch.zeros_like(self.counts)]
        begins += [(ordered < edge).sum(-1, dtype=torch.int32) for edge in edges[1:-1]]
        begins.append(self.counts)
        parts = []
        for i, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            width = min(self.indices.shape[3], last - first)
            offsets = torch.arange(width, dtype=torch.int32, device=self.indices.device)
            source = (begins[i].unsqueeze(-1) + offsets).clamp_(max=max(self.indices.shape[3] - 1, 0))
            indices = (self.indices.gather(-1, source.long()) - first).clamp_(0, max(last - first - 1, 0))
            counts = begins[i + 1] - begins[i]
            parts.append((indices, counts))
        return parts

    def cut_keys(self, first: int, last: int) -> tuple[BlockMask, BlockMask]:
        """The mask of the key tokens `[first, last)`, counted from `first`, and that of all keys but those.

        `first` and `last` are as the edges of `split_keys`.
        """
        before, inside, _ = self.split_keys((0, first, last, self.key_length))
        width = self.indices.shape[3]
        slots = torch.arange(width, dtype=torch.int32, device=self.indices.device)
        # A row is ascending, so what lies inside is one run of it, which the later entries close up over.
        skipped = torch.where(slots < before.counts.unsqueeze(-1), 0, inside.counts.unsqueeze(-1))
        indices = self.indices.gather(-1, (slots + skipped).clamp_(max=max(width - 1, 0)).long())
        return inside, replace(self, indices=indices, counts=self.counts - inside.counts)

    def attended_pairs(self) -> Tensor:
        """Attended (query token, key token) pairs over all batches and heads: a float64 scalar tensor, not synchronised."""
        device = self.indices.device
        rows = _block_lengths(self.query_length, self.block_size[0], device)
        columns = _block_lengths(self.key_length, self.block_size[1], device)
        if columns.numel() == 0 or self.indices.shape[3] == 0:
            return torch.zeros((), dtype=torch.float64, device=device)
        # A row is ascending, so only its last entry can be the key block that ends short.
        last = self.indices.gather(-1, (self.counts - 1).clamp_(min=0).long().unsqueeze(-1)).squeeze(-1)
        ends_short = (self.counts > 0) & (last == self.num_key_blocks - 1)
        keys = self.counts.double() * self.block_size[1] - ends_short * (self.block_size[1] - columns[-1])
        return (keys * rows).sum()

    def density(self) -> Tensor:
        """Attended pairs over all pairs: a float64 scalar tensor, not synchronised."""
        batch, heads, _ = self.counts.shape
        return self.attended_pairs() / max(batch * heads * self.query_length * self.key_length, 1)

    def _used(self) -> Tensor:
        slots = torch.arange(self.indices.shape[3], dtype=torch.int32, device=self.indices.device)
        return slots < self.counts.unsqueeze(-1)


def _block_lengths(length: int, size: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, length, size, dtype=torch.float64, device=device)
    return (length - starts).clamp_(max=size)
