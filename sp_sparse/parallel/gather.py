"""Putting the shards of a sequence together on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards


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
