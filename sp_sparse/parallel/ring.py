"""Ring attention (arXiv 2310.01889): key/value shards travel, queries stay, partial results merge by LSE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.merge import merge
from sp_sparse.parallel.streams import Pending, SideStream

# (key, value, owner) -> (out, lse): attention of this rank's queries over the shard of ring rank `owner`.
AttendShard = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def ring_attention(
    attend: AttendShard, key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup, side: SideStream
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every shard of the ring.

    Args:
        attend: computes the partial attention over one shard.
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        lengths: tokens of each ring rank's shard; ranks without any are passed over.
        group: the ring group.
        side: where shards travel while others are attended.

    Returns:
        out `[B, Sq, H, D]` in the dtype of `key`, and lse `[B, H, Sq]`.
    """
    merged: tuple[Tensor, Tensor] | None = None
    remaining = sum(length > 0 for length in lengths)
    for owner, hop_key, hop_value in _shards(key, value, lengths, group, side):
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
    key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup, side: SideStream
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (owner, key, value) of every shard, own first, while the next one is in flight.

    At hop `h` rank `r` holds the shard of `(r - h) mod R`: it sends to `r + 1` and receives from `r - 1`. Beside the
    caller's own shard at most two are held: the one being attended and the one arriving.
    """
    rank, ranks = dist.get_rank(group), len(lengths)
    batch, _, heads, head_dim = key.shape
    spare: list[Tensor] = []
    held = key.contiguous(), value.contiguous()
    for hop in range(ranks - 1):
        owner, next_owner = (rank - hop) % ranks, (rank - hop - 1) % ranks
        if len(spare) < 2:
            spare.append(key.new_empty(2, batch * max(lengths) * heads * head_dim))
        count = batch * lengths[next_owner] * heads * head_dim
        key_part, value_part = (part[:count] for part in spare[hop % 2])
        pending = _pass_on(held, (key_part, value_part), group, side)
        yield owner, *held
        pending.join()
        shape = batch, lengths[next_owner], heads, head_dim
        held = key_part.view(shape), value_part.view(shape)
    yield (rank + 1) % ranks, *held


def _pass_on(
    outgoing: tuple[Tensor, ...], incoming: tuple[Tensor, ...], group: ProcessGroup, side: SideStream
) -> Pending:
    """Send to the next rank of the ring and receive from the one before; both keep to all-to-all's order of calls."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with side.run() as pending:
        for leaving, arriving in zip(outgoing, incoming, strict=True):
            sent, received = [0] * ranks, [0] * ranks
            sent[(rank + 1) % ranks], received[(rank - 1) % ranks] = leaving.numel(), arriving.numel()
            # Between two ranks only, as an all-to-all: point-to-point calls would not run on a stream of ours.
            dist.all_to_all_single(arriving, leaving.view(-1), received, sent, group=group)
    return pending
