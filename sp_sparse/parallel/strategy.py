"""How shards meet around one attention call: none, Ulysses, ring, or Ulysses within a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.parallel.collectives import all_gather_uneven, realign
from sp_sparse.parallel.kv_exchange import AS_ASKED, KVExchange
from sp_sparse.parallel.merge import PartialResults
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.ring import ring_hops
from sp_sparse.parallel.shards import SequenceShards, split_evenly
from sp_sparse.parallel.ulysses import (
    Gathering,
    HeadRanges,
    Scattering,
    head_ranges,
    start_gather,
    start_scatter,
)

# (query, key, value, mask or None for dense) -> (out, lse or None)
Attend = Callable[[Tensor, Tensor, Tensor, "BlockMask | None"], "tuple[Tensor, Tensor | None]"]

# Some of the keys, their values, and the mask's columns of them, None for dense.
Part = tuple[Tensor, Tensor, "BlockMask | None"]


@dataclass(frozen=True)
class ParallelContext:
    """What `post_attention` needs to undo `pre_attention`.

    Attributes:
        shards: the cut over all ranks that the caller came with.
        gathered: the cut over the ring after Ulysses has gathered, as the caller's cut makes it.
        heads: heads that each rank of the Ulysses group attends.
    """

    shards: SequenceShards
    gathered: SequenceShards
    heads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SequenceParallelStrategy:
    """Participates in an attention call as vllm-omni's parallel-attention strategies do, and runs the ring itself.

    `pre_attention` turns this rank's tokens of all heads into the ring shard of some heads, starting at a block edge;
    `attend` runs a kernel over every key; `post_attention` turns the output back into this rank's tokens of all heads.
    `exchange` is all of a call's `pre_attention` and `post_attention`, in parts where that hides communication.

    Attributes:
        mesh: the process groups.
        block: tokens to a multiple of which ring shards start: a multiple of both block sizes of the masks.
        head_chunks: in how many parts a rank's heads are exchanged under Ulysses alone, each while another is attended.
    """

    mesh: SequenceParallelMesh
    block: int
    head_chunks: int = 2

    def heads(self, num_heads: int) -> tuple[int, ...]:
        """Heads that each rank of the Ulysses group attends.

        Raises:
            ValueError: fewer heads than ranks.
        """
        degree = self.mesh.ulysses_degree
        if num_heads < degree:
            raise ValueError(
                f"{num_heads} heads cannot be split over ulysses_degree={degree}; use at most {num_heads}, "
                f"and ring_degree for the other ranks"
            )
        return split_evenly(num_heads, degree)

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SequenceShards
    ) -> tuple[Tensor, Tensor, Tensor, SequenceShards, ParallelContext]:
        """`[B, S_rank, H, D]` each -> `[B, S_ring, H_rank, D]` each, and the cut of the sequence over the ring.

        Raises:
            ValueError: this rank's tensors do not hold the tokens that `metadata` gives it.
        """
        self._check_held(query, metadata)
        heads = self.heads(query.shape[2])
        gathered = metadata.grouped(self.mesh.ulysses_degree)
        context = ParallelContext(metadata, gathered, heads)
        tensors: tuple[Tensor, ...] = (query, key, value)
        if self.mesh.ulysses_group is not None:
            (ranges,) = head_ranges(heads)
            # A ring sends keys and values on, and so wants each of them contiguous; else all travel together.
            messages = [tensors] if self.mesh.ring_group is None else [(x,) for x in tensors]
            pending = [self.start_gather(message, metadata, ranges, self.mesh.ulysses_group) for message in messages]
            tensors = tuple(x for gathering in pending for x in gathering.finish())
        aligned = gathered.realigned(self.block)
        if aligned != gathered:
            tensors = realign(tensors, gathered, aligned, self.mesh.ring_group)
        query, key, value = tensors
        return query, key, value, aligned, context

    def attend(
        self,
        kernel: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask | None,
        metadata: SequenceShards,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of this ring shard's queries over all keys: out `[B, S_ring, H_rank, D]` and the kernel's LSE.

        Args:
            kernel: attends some keys; under a ring it must return the LSE.
            query, key, value, metadata: as `pre_attention` returns them.
            mask: over this shard's query blocks and all key blocks of the sequence; None attends everything.
        """
        if self.mesh.ring_group is None:
            return kernel(query, key, value, mask)
        count, parts = self.parts(key, value, mask, metadata, self.mesh.ring_group)
        results = PartialResults(count, key.dtype)
        for part_key, part_value, part_mask in parts:
            results.add(*kernel(query, part_key, part_value, part_mask))
        return results.out, results.lse

    def parts(
        self, key: Tensor, value: Tensor, mask: BlockMask | None, metadata: SequenceShards, group: ProcessGroup
    ) -> tuple[int, Iterator[Part]]:
        """How many parts the keys of the ring come in, and each as it arrives: a shard a hop."""
        columns = None if mask is None else mask.split_keys(metadata.edges)
        hops = ring_hops(key, value, metadata.lengths, group, self.mesh.side_stream(key.device))
        parts = ((k, v, None if columns is None else columns[owner]) for owner, k, v in hops)
        return sum(length > 0 for length in metadata.lengths), parts

    def kv_exchange(self, like: Tensor, dense: bool, metadata: SequenceShards) -> KVExchange | None:
        """How `attend` comes by the keys of other ranks, None where it needs none; the same on all ranks.

        Args:
            like: queries or keys: batch, head dimension, dtype and device count.
            dense: whether there is no mask.
            metadata: the cut of the sequence over the ring, as `pre_attention` returns it.
        """
        return None if self.mesh.ring_group is None else KVExchange("ring", AS_ASKED)

    def post_attention(self, out: Tensor, context: ParallelContext) -> Tensor:
        """The reverse of `pre_attention`: `[B, S_ring, H_rank, D]` -> `[B, S_rank, H, D]`, 0 in padding."""
        aligned = context.gathered.realigned(self.block)
        if aligned != context.gathered:
            (out,) = realign((out,), aligned, context.gathered, self.mesh.ring_group)
        if self.mesh.ulysses_group is not None:
            (ranges,) = head_ranges(context.heads)
            result = self.empty_out(out, context.shards, sum(context.heads))
            self.start_scatter(out, result, context.shards, ranges, self.mesh.ulysses_group).finish()
            return result
        return out

    def exchange(self, query: Tensor, key: Tensor, value: Tensor, metadata: SequenceShards) -> Exchange:
        """Everything between this rank's tokens and attention, there and back; arguments as for `pre_attention`."""
        heads = self.heads(query.shape[2])
        gathered = metadata.grouped(self.mesh.ulysses_degree)
        # Within a ring two communicators would be at work at once, which NCCL may answer with a deadlock.
        chunks = 1 if self.mesh.ring_group is not None else min(self.head_chunks, *heads)
        group = self.mesh.ulysses_group
        if group is None or chunks == 1 or gathered.realigned(self.block) != gathered:
            return Exchange(self, query, key, value, metadata)
        self._check_held(query, metadata)
        return ChunkedExchange(self, query, key, value, metadata, head_ranges(heads, chunks), group)

    def gather_blocks(self, summaries: Tensor, metadata: SequenceShards, block: int) -> Tensor:
        """Put the block summaries of every ring shard together: `[B, H, N_shard, ...]` -> `[B, H, N, ...]`."""
        group = self.mesh.ring_group
        if group is None:
            return summaries
        counts = [num_blocks(length, block) for length in metadata.lengths]
        return all_gather_uneven(summaries, counts, group, dim=2)

    def sum_shards(self, x: Tensor) -> Tensor:
        """What every ring shard made of its own keys, `[B, H_rank, ...]`, summed over the ring; `x` may be overwritten."""
        if self.mesh.ring_group is not None:
            dist.all_reduce(x, group=self.mesh.ring_group)
        return x

    def key_tokens(self, query_tokens: int, metadata: SequenceShards) -> int:
        """Tokens of key and value that a rank brings beside so many queries."""
        return query_tokens

    def start_gather(
        self, tensors: tuple[Tensor, ...], shards: SequenceShards, ranges: HeadRanges, group: ProcessGroup
    ) -> Gathering:
        """Begin to give away heads and receive tokens: `ranges` are the heads that each rank is to receive."""
        return start_gather(
            tensors, self._group_tokens(shards), ranges, group, self.mesh.side_stream(tensors[0].device)
        )

    def start_scatter(
        self, x: Tensor, out: Tensor, shards: SequenceShards, ranges: HeadRanges, group: ProcessGroup
    ) -> Scattering:
        """Begin to return `x`, this rank's heads of the group's tokens, into `out`, this rank's tokens of all heads."""
        return start_scatter(x, out, self._group_tokens(shards), ranges, group, self.mesh.side_stream(x.device))

    def empty_out(self, like: Tensor, shards: SequenceShards, num_heads: int) -> Tensor:
        """Room for this rank's tokens of all heads."""
        return like.new_empty(like.shape[0], shards.lengths[self.mesh.sequence_rank], num_heads, like.shape[3])

    def _group_tokens(self, shards: SequenceShards) -> tuple[int, ...]:
        first = self.mesh.ring_rank * self.mesh.ulysses_degree
        return shards.lengths[first : first + self.mesh.ulysses_degree]

    def _check_held(self, query: Tensor, shards: SequenceShards) -> None:
        rank, degree = self.mesh.sequence_rank, self.mesh.sequence_degree
        if len(shards.lengths) != degree:
            raise ValueError(
                f"shards for {len(shards.lengths)} ranks were given to a mesh of {degree}; cut the sequence for {degree}"
            )
        if query.shape[1] != shards.lengths[rank]:
            raise ValueError(
                f"rank {rank} holds {query.shape[1]} tokens but its shard of {shards.lengths} is {shards.lengths[rank]}; "
                "cut the sequence with SequenceShards.aligned, or pass the cut you made as `shards`"
            )


class Exchange:
    """One call's tokens on their way to attention and back: `pre_attention` and `post_attention` around a loop.

    ```
    exchange = strategy.exchange(query, key, value, shards)
    for q, k, v, ring_shards in exchange:
        exchange.give_back(attended)
    exchange.out
    ```
    """

    def __init__(
        self, strategy: SequenceParallelStrategy, query: Tensor, key: Tensor, value: Tensor, metadata: SequenceShards
    ) -> None:
        self._strategy, self._tensors, self._metadata = strategy, (query, key, value), metadata
        self._context: ParallelContext | None = None
        self._out: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, SequenceShards]]:
        """The query, key and value to attend, `[B, S_ring, heads, D]` each, and the cut of the sequence over the ring."""
        query, key, value, ring_shards, self._context = self._strategy.pre_attention(*self._tensors, self._metadata)
        yield query, key, value, ring_shards

    def give_back(self, out: Tensor) -> None:
        """What attention made of the tensors that were yielded last, `[B, S_ring, heads, D]`."""
        assert self._context is not None, "called within the loop"
        self._out = self._strategy.post_attention(out, self._context)

    @property
    def out(self) -> Tensor:
        """This rank's tokens of all heads, `[B, S_rank, H, D]`, once the loop has ended."""
        assert self._out is not None, "read after the loop"
        return self._out


class ChunkedExchange(Exchange):
    """Under Ulysses alone: some of a rank's heads are exchanged while others are attended."""

    def __init__(
        self,
        strategy: SequenceParallelStrategy,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        metadata: SequenceShards,
        ranges: Sequence[HeadRanges],
        group: ProcessGroup,
    ) -> None:
        """`ranges`: for each chunk, the heads that each rank of the Ulysses group attends."""
        super().__init__(strategy, query, key, value, metadata)
        self._ranges, self._group = ranges, group
        self._returning: list[Scattering] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, SequenceShards]]:
        gathered = self._metadata.grouped(self._strategy.mesh.ulysses_degree)
        arriving = self._start_gather(0)
        for chunk in range(len(self._ranges)):
            query, key, value = arriving.finish()
            if chunk + 1 < len(self._ranges):
                arriving = self._start_gather(chunk + 1)
            yield query, key, value, gathered
        for scattering in self._returning:
            scattering.finish()

    def give_back(self, out: Tensor) -> None:
        if self._out is None:
            query = self._tensors[0]
            self._out = self._strategy.empty_out(query, self._metadata, query.shape[2])
        ranges = self._ranges[len(self._returning)]
        self._returning.append(self._strategy.start_scatter(out, self._out, self._metadata, ranges, self._group))

    def _start_gather(self, chunk: int) -> Gathering:
        return self._strategy.start_gather(self._tensors, self._metadata, self._ranges[chunk], self._group)
