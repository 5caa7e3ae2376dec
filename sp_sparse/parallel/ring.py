"""Ring attention (arXiv 2310.01889): key/value shards travel, queries stay, partial results merge by LSE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.merge import merge

# (key, value, owner) -> (out, lse): attention of this rank's queries over the shard of ring rank `owner`.
AttendShard = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def ring_attention(
    attend: AttendShard, key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every shard of the ring.

    Args:
        attend: computes the partial attention over one shard.
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        lengths: tokens of each ring rank's shard; ranks without any are passed over.
        group: the ring group.

    Returns:
        out `[B, Sq, H, D]` in the dtype of `key`, and lse `[B, H, Sq]`.
    """
    merged: tuple[Tensor, Tensor] | None = None
    remaining = sum(length > 0 for length in lengths)
    for owner, hop_key, hop_value in _shards(key, value, lengths, group):
        if lengths[owner] == 0:
            continue
        remaining -= 1
        out, lse = attend(hop_key, hop_value, owner)
        if merged is None:
            merged = out, lse
        else:
            # Between hops in the precision of the LSE; the last merge writes the final dtype.
            merged = merge(*merged, out, lse, dtype=None if remaining else key.dtype)
    if merged is None:
        raise ValueError("every shard of the ring is empty; there is nothing to attend")
    return merged[0].to(key.dtype), merged[1]


def _shards(
    key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (owner, key, value) of every shard, own first, while the next one is in flight.

    At hop `h` rank `r` holds the shard of `(r - h) mod R`: it sends to `r + 1` and receives from `r - 1`. Beside the
    caller's own shard at most two are held: the one being attended and the one arriving.
    """
    rank, ranks = dist.get_rank(group), len(lengths)
    onward, behind = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    batch, _, heads, head_dim = key.shape
    spare: list[Tensor] = []
    held = key.contiguous(), value.contiguous()
    for hop in range(ranks):
        owner, next_owner = (rank - hop) % ranks, (rank - hop - 1) % ranks
        arriving: tuple[Tensor, ...] = ()
        pending: list[dist.Work] = []
        if hop + 1 < ranks:
            if len(spare) < 2:
                spare.append(key.new_empty(2, batch * max(lengths) * heads * head_dim))
            buffer = spare[hop % 2]
            count = batch * lengths[next_owner] * heads * head_dim
            arriving = tuple(part[:count].view(batch, lengths[next_owner], heads, head_dim) for part in buffer)
            pending = _exchange(held, arriving, onward, behind, group)
        yield owner, *held
        for work in pending:
            work.wait()
        if arriving:
            held = arriving[0], arriving[1]


def _exchange(
    outgoing: tuple[Tensor, ...], incoming: tuple[Tensor, ...], onward: int, behind: int, group: ProcessGroup
) -> list[dist.Work]:
    operations = [dist.P2POp(dist.isend, x, onward, group) for x in outgoing if x.numel()]
    operations += [dist.P2POp(dist.irecv, x, behind, group) for x in incoming if x.numel()]
    return dist.batch_isend_irecv(operations) if operations else []
