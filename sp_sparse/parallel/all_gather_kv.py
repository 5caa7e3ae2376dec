"""All-gathered keys and values: a rank attends its queries over the shards of all ring ranks at once.

Either the ranks gather them here: own shard first, while the others arrive, then those in one call. Against the ring that
holds the keys and values of the whole sequence instead of about half of them, and calls the kernel twice and merges once,
however many ranks there are. Or the caller has gathered them before the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask
from sp_sparse.parallel.collectives import realign
from sp_sparse.parallel.kv_exchange import AS_ASKED, KVExchange
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import Attend, ParallelContext, Part, SequenceParallelStrategy


@dataclass(frozen=True, eq=False)
class AllGatherKVStrategy(SequenceParallelStrategy):
    """As `SequenceParallelStrategy`, but ring ranks gather all keys and values at once instead of passing shards on."""

    def parts(
        self, key: Tensor, value: Tensor, mask: BlockMask | None, metadata: SequenceShards, group: ProcessGroup
    ) -> tuple[int, Iterator[Part]]:
        """The own shard, then all others in one; dense attention takes everything in one call and is not overlapped."""
        own = mask is not None and metadata.lengths[self.mesh.ring_rank] > 0
        return 1 + own, gathered_keys(key, value, mask, metadata.edges, group)

    def kv_exchange(self, like: Tensor, dense: bool, metadata: SequenceShards) -> KVExchange | None:
        return None if self.mesh.ring_group is None else KVExchange("all_gather", AS_ASKED)


@dataclass(frozen=True, eq=False)
class CallerAllGatherKVStrategy(SequenceParallelStrategy):
    """Ranks of a ring group, without Ulysses, that share the queries; the caller brings the keys and values of the whole
    sequence, without padding. What moves here are queries at shard edges alone."""

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
        kernel: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask | None,
        metadata: SequenceShards,
    ) -> tuple[Tensor, Tensor | None]:
        """One call of the kernel: nothing is left to merge."""
        return kernel(query, key, value, mask)

    def gather_blocks(self, summaries: Tensor, metadata: SequenceShards, block: int) -> Tensor:
        """They are of the whole sequence already."""
        return summaries

    def sum_shards(self, x: Tensor) -> Tensor:
        """Likewise."""
        return x

    def kv_exchange(self, like: Tensor, dense: bool, metadata: SequenceShards) -> KVExchange | None:
        """None: the caller has gathered them."""
        return None

    def key_tokens(self, query_tokens: int, metadata: SequenceShards) -> int:
        """Those of the whole sequence, without padding."""
        return metadata.sequence_length


def gathered_keys(
    key: Tensor, value: Tensor, mask: BlockMask | None, edges: Sequence[int], group: ProcessGroup
) -> Iterator[Part]:
    """Yield (key, value, mask): the own shard while the others are on their way, then everything under the rest of the mask.

    Args:
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        mask: over this rank's query blocks and all key blocks; None attends everything, which is then yielded alone.
        edges: first token of each rank's shard, then the end of the last.
        group: the ring group.
    """
    rank = dist.get_rank(group)
    first, last = edges[rank], edges[rank + 1]
    # Token-major, so that every shard arrives in its place.
    batch, _, heads, head_dim = key.shape
    everything = [x.new_empty(edges[-1], batch, heads, head_dim) for x in (key, value)]
    pending = _start_gather((key, value), everything, edges, group)
    all_key, all_value = (x.transpose(0, 1) for x in everything)
    if mask is None:
        all_key[:, first:last], all_value[:, first:last] = key, value
    elif first < last:
        own, mask = mask.cut_keys(first, last)
        yield key, value, own
    for work in pending:
        work.wait()
    yield all_key, all_value, mask


def _start_gather(
    shard: tuple[Tensor, ...], everything: list[Tensor], edges: Sequence[int], group: ProcessGroup
) -> list[dist.Work]:
    rank = dist.get_rank(group)
    operations = []
    send = [x.transpose(0, 1).contiguous() for x in shard]
    for peer in range(len(edges) - 1):
        if peer == rank:
            continue
        other = dist.get_global_rank(group, peer)
        operations += [dist.P2POp(dist.isend, x, other, group) for x in send if x.numel()]
        arriving = [x[edges[peer] : edges[peer + 1]] for x in everything]
        operations += [dist.P2POp(dist.irecv, x, other, group) for x in arriving if x.numel()]
    return dist.batch_isend_irecv(operations) if operations else []
