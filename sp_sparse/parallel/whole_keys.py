"""Ranks that share the queries, each of which is given the keys and values of the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sp_sparse.mask import BlockMask
from sp_sparse.parallel.realign import realign
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import Attend, ParallelContext, SequenceParallelStrategy


@dataclass(frozen=True, eq=False)
class WholeKeysStrategy(SequenceParallelStrategy):
    """All-gather-KV parallelism after the gather, which is the caller's: what moves here are queries at shard edges alone.

    The ranks are those of the mesh's ring group; there is no Ulysses.
    """

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SequenceShards
    ) -> tuple[Tensor, Tensor, Tensor, SequenceShards, ParallelContext]:
        """Queries `[B, S_rank, H, D]` -> those of the shard that starts at a block edge; keys and values stay."""
        self._check_held(query, metadata)
        aligned = metadata.realigned(self.block)
        if aligned != metadata:
            (query,) = realign((query,), metadata, aligned, self.mesh.ring_group)
        return query, key, value, aligned, ParallelContext(metadata, metadata, self.heads(query.shape[2]))

    def attend(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask | None,
        metadata: SequenceShards,
    ) -> Tensor:
        """One call of the kernel: nothing is left to merge."""
        return attend(query, key, value, mask)[0]

    def gather_blocks(self, summaries: Tensor, metadata: SequenceShards, block: int) -> Tensor:
        """They are of the whole sequence already."""
        return summaries

    def key_tokens(self, query_tokens: int, metadata: SequenceShards) -> int:
        """Those of the whole sequence, without padding."""
        return metadata.sequence_length
