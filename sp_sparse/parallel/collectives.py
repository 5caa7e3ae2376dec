"""Collectives over uneven shards: all-gathers that put a sequence together, and moves between two cuts of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards, overlap

# Bytes; of what torch's allocator gives, and more than compiled code asks of an input.
_ALIGNMENT = 512


def gather_tokens(x: Tensor, shards: SequenceShards, mesh: SequenceParallelMesh) -> Tensor:
    """This rank's tokens `[B, S_rank, …]` -> those of all ranks of the mesh, `[B, S, …]`, without padding.

    First within the Ulysses group, then over the ring, so that no further process group is needed.
    """
    if mesh.ulysses_group is not None:
        first = mesh.ring_rank * mesh.ulysses_degree
        x = all_gather_uneven(x, shards.lengths[first : first + mesh.ulysses_degree], mesh.ulysses_group, 1)
    if mesh.ring_group is not None:
        x = all_gather_uneven(x, shards.grouped(mesh.ulysses_degree).lengths, mesh.ring_group, 1)
    return x[:, : shards.sequence_length]


def from_first(x: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """The tensor of the first rank of the mesh whose groups these are, on all of its ranks. `x` itself stays as it is."""
    if not groups:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    for group in groups:
        dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    return x


def all_from_first(tensors: Sequence[Tensor], groups: Sequence[ProcessGroup]) -> list[Tensor]:
    """`from_first` of several tensors of one device, in one broadcast a group: the results share one buffer."""
    if not groups or len(tensors) < 2:
        return [from_first(x, groups) for x in tensors]
    begins = [0]
    for x in tensors:
        begins.append(begins[-1] + -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT)
    buffer = torch.empty(begins[-1], dtype=torch.uint8, device=tensors[0].device)
    parts = [
        buffer[begin : begin + x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        for x, begin in zip(tensors, begins, strict=False)
    ]
    for part, x in zip(parts, tensors, strict=True):
        part.copy_(x.detach())
    for group in groups:
        dist.broadcast(buffer, dist.get_global_rank(group, 0), group=group)
    return parts


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The contiguous tensors of a group's ranks, alike in shape, stacked: `[ranks, *x.shape]`."""
    everyone = x.new_empty(dist.get_world_size(group), *x.shape)
    # Renamed in torch 2.13, where the old name warns.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(everyone.flatten(0, 1), x, group=group)
    return everyone


def all_gather_uneven(x: Tensor, lengths: Sequence[int], group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate the tensors of a group's ranks along `dim`, where rank `i` brings `lengths[i]` entries."""
    longest = max(lengths)
    moved = x.movedim(dim, 0)
    send = x.new_zeros(longest, *moved.shape[1:])
    send[: moved.shape[0]] = moved
    parts = [part[:length] for part, length in zip(all_gather(send, group), lengths, strict=True)]
    return torch.cat(parts).movedim(0, dim)


def realign(
    tensors: tuple[Tensor, ...], source: SequenceShards, target: SequenceShards, group: ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Move `[B, S, H, D]` tensors from the cut `source` to the cut `target` of the ranks of `group`.

    Padding of `source` is dropped and padding of `target` is 0. Every rank knows both cuts, so the messages (one a pair
    of ranks whose ranges overlap) are the same seen from both ends.
    """
    rank = 0 if group is None else dist.get_rank(group)
    held, wanted = source.range_of(rank), target.range_of(rank)
    pieces: dict[int, Tensor] = {}
    operations: list[dist.P2POp] = []
    like = tensors[0]
    for peer in range(len(source.lengths)):
        if peer == rank or group is None:
            continue
        give = overlap(held, target.range_of(peer))
        take = overlap(wanted, source.range_of(peer))
        if give[0] < give[1]:
            part = torch.stack([x[:, give[0] - held[0] : give[1] - held[0]] for x in tensors])
            operations.append(dist.P2POp(dist.isend, part, dist.get_global_rank(group, peer), group))
        if take[0] < take[1]:
            shape = (len(tensors), like.shape[0], take[1] - take[0], *like.shape[2:])
            pieces[peer] = like.new_empty(shape)
            operations.append(dist.P2POp(dist.irecv, pieces[peer], dist.get_global_rank(group, peer), group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    keep = overlap(held, wanted)
    padding = target.lengths[rank] - (wanted[1] - wanted[0])
    moved = []
    for i, x in enumerate(tensors):
        parts = {peer: piece[i] for peer, piece in pieces.items()}
        if keep[0] < keep[1]:
            parts[rank] = x[:, keep[0] - held[0] : keep[1] - held[0]]
        ordered = [parts[peer] for peer in sorted(parts)]
        if padding:
            ordered.append(x.new_zeros(x.shape[0], padding, *x.shape[2:]))
        moved.append(ordered[0] if len(ordered) == 1 else torch.cat(ordered, 1) if ordered else x[:, :0])
    return tuple(moved)
