"""How shards meet around one attention call: none, Ulysses, ring, or Ulysses within a ring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.parallel.gather import all_gather_uneven
from sp_sparse.parallel.gathered import gathered_attention
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.realign import realign
from sp_sparse.parallel.ring import ring_attention
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

    Attributes:
        mesh: the process groups.
        block: tokens to a multiple of which ring shards start: a multiple of both block sizes of the masks.
        kv_exchange: how ring ranks come by the others' keys and values: `ring`, or `all_gather`.
        head_chunks: in how many parts `run` exchanges a rank's heads under Ulysses alone, each while another is attended.
    """

    mesh: SequenceParallelMesh
    block: int
    kv_exchange: str = "ring"
    head_chunks: int = 2

    @property
    def enabled(self) -> bool:
        return self.mesh.sequence_degree > 1

    @property
    def name(self) -> str:
        names = [n for n in ("ulysses", "ring") if getattr(self.mesh, f"{n}_degree") > 1]
        return "+".join(names) or "none"

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
            pending = [self._start_gather(message, metadata, ranges, self.mesh.ulysses_group) for message in messages]
            tensors = tuple(x for gathering in pending for x in gathering.finish())
        aligned = gathered.realigned(self.block)
        if aligned != gathered:
            tensors = realign(tensors, gathered, aligned, self.mesh.ring_group)
        query, key, value = tensors
        return query, key, value, aligned, context

    def attend(
        self,
        attend: Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask | None,
        metadata: SequenceShards,
    ) -> Tensor:
        """Attention of this ring shard's queries over all keys, `[B, S_ring, H_rank, D]`.

        Args:
            attend: the kernel; under ring it must return the LSE.
            query, key, value, metadata: as `pre_attention` returns them.
            mask: over this shard's query blocks and all key blocks of the sequence; None attends everything.
        """
        if self.mesh.ring_group is None:
            return attend(query, key, value, mask)[0]
        group, lengths = self.mesh.ring_group, metadata.lengths

        def attend_keys(keys: Tensor, values: Tensor, part: BlockMask | None) -> tuple[Tensor, Tensor]:
            out, lse = attend(query, keys, values, part)
            if lse is None:
                raise ValueError("the kernel returned no LSE, which ring parallelism needs; use one that does")
            return out, lse

        if self.kv_exchange == "all_gather":
            return gathered_attention(attend_keys, key, value, mask, lengths, group)[0]
        hops = None if mask is None else mask.split_keys(metadata.edges)

        def attend_shard(keys: Tensor, values: Tensor, owner: int) -> tuple[Tensor, Tensor]:
            return attend_keys(keys, values, None if hops is None else hops[owner])

        return ring_attention(attend_shard, key, value, lengths, group, self.mesh.side_stream(key.device))[0]

    def post_attention(self, out: Tensor, context: ParallelContext) -> Tensor:
        """The reverse of `pre_attention`: `[B, S_ring, H_rank, D]` -> `[B, S_rank, H, D]`, 0 in padding."""
        aligned = context.gathered.realigned(self.block)
        if aligned != context.gathered:
            (out,) = realign((out,), aligned, context.gathered, self.mesh.ring_group)
        if self.mesh.ulysses_group is not None:
            (ranges,) = head_ranges(context.heads)
            result = self._empty_out(out, context.shards, sum(context.heads))
            self._start_scatter(out, result, context.shards, ranges, self.mesh.ulysses_group).finish()
            return result
        return out

    def run(
        self,
        body: Callable[[Tensor, Tensor, Tensor, SequenceShards], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        metadata: SequenceShards,
    ) -> Tensor:
        """`pre_attention`, `body`, `post_attention`; under Ulysses alone some heads are exchanged while others are attended.

        Args:
            body: (query, key, value, cut over the ring) -> out, as between `pre_attention` and `post_attention`; it is
                called once for every chunk of this rank's heads.
            query, key, value, metadata: as for `pre_attention`.
        """
        heads = self.heads(query.shape[2])
        group = self.mesh.ulysses_group
        gathered = metadata.grouped(self.mesh.ulysses_degree)
        # Within a ring two communicators would be at work at once, which NCCL may answer with a deadlock.
        chunks = 1 if self.mesh.ring_group is not None else min(self.head_chunks, *heads)
        if group is None or chunks == 1 or gathered.realigned(self.block) != gathered:
            q, k, v, ring_shards, context = self.pre_attention(query, key, value, metadata)
            return self.post_attention(body(q, k, v, ring_shards), context)
        self._check_held(query, metadata)
        tensors = query, key, value
        ranges = head_ranges(heads, chunks)
        result: Tensor | None = None
        returning = []
        arriving = self._start_gather(tensors, metadata, ranges[0], group)
        for chunk in range(chunks):
            q, k, v = arriving.finish()
            if chunk + 1 < chunks:
                arriving = self._start_gather(tensors, metadata, ranges[chunk + 1], group)
            out = body(q, k, v, gathered)
            if result is None:
                result = self._empty_out(query, metadata, query.shape[2])
            returning.append(self._start_scatter(out, result, metadata, ranges[chunk], group))
        for scattering in returning:
            scattering.finish()
        assert result is not None
        return result

    def gather_blocks(self, summaries: Tensor, metadata: SequenceShards, block: int) -> Tensor:
        """Put the block summaries of every ring shard together: `[B, H, N_shard, D]` -> `[B, H, N, D]`."""
        group = self.mesh.ring_group
        if group is None:
            return summaries
        counts = [num_blocks(length, block) for length in metadata.lengths]
        return all_gather_uneven(summaries, counts, group, dim=2)

    def key_tokens(self, query_tokens: int, metadata: SequenceShards) -> int:
        """Tokens of key and value that a rank brings beside so many queries."""
        return query_tokens

    def _start_gather(
        self, tensors: tuple[Tensor, ...], shards: SequenceShards, ranges: HeadRanges, group: ProcessGroup
    ) -> Gathering:
        return start_gather(
            tensors, self._group_tokens(shards), ranges, group, self.mesh.side_stream(tensors[0].device)
        )

    def _start_scatter(
        self, x: Tensor, out: Tensor, shards: SequenceShards, ranges: HeadRanges, group: ProcessGroup
    ) -> Scattering:
        return start_scatter(x, out, self._group_tokens(shards), ranges, group, self.mesh.side_stream(x.device))

    def _empty_out(self, like: Tensor, shards: SequenceShards, num_heads: int) -> Tensor:
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
