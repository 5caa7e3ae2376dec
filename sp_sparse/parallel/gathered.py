"""Ring ranks that gather all keys and values at once: own shard first, while the others arrive, then those in one call.

Against the ring it holds the keys and values of the whole sequence instead of two shards of them, and calls the kernel
twice and merges once, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask
from sp_sparse.parallel.merge import merge

# (key, value, mask or None for dense) -> (out, lse): attention of this rank's queries.
AttendKeys = Callable[[Tensor, Tensor, "BlockMask | None"], tuple[Tensor, Tensor]]


def gathered_attention(
    attend: AttendKeys,
    key: Tensor,
    value: Tensor,
    mask: BlockMask | None,
    lengths: Sequence[int],
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every shard of the group.

    Args:
        attend: computes attention over some keys.
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        mask: over this rank's query blocks and all key blocks; None attends everything, and is not overlapped.
        lengths: tokens of each rank's shard.
        group: the ring group.

    Returns:
        out `[B, Sq, H, D]` in the dtype of `key`, and lse `[B, H, Sq]`.
    """
    rank = dist.get_rank(group)
    edges = (0, *accumulate(lengths))
    first, last = edges[rank], edges[rank + 1]
    # Token-major, so that every shard arrives in its place.
    batch, _, heads, head_dim = key.shape
    everything = [x.new_empty(edges[-1], batch, heads, head_dim) for x in (key, value)]
    pending = _start_gather((key, value), everything, edges, group)
    all_key, all_value = (x.transpose(0, 1) for x in everything)
    own: tuple[Tensor, Tensor] | None = None
    if mask is None:
        all_key[:, first:last], all_value[:, first:last] = key, value
    elif first < last:
        inside, mask = mask.apart(first, last)
        own = attend(key, value, inside)
    for work in pending:
        work.wait()
    out, lse = attend(all_key, all_value, mask)
    return (out, lse) if own is None else merge(*own, out, lse, dtype=key.dtype)


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
