"""Ring attention (arXiv 2310.01889): key/value shards travel while queries stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.streams import Pending, SideStream


def ring_hops(
    key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup, side: SideStream
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (owner, key, value) of every shard that holds tokens, own first, while the next one is in flight.

    At hop `h` rank `r` holds the shard of `(r - h) mod R`: it sends to `r + 1` and receives from `r - 1`. Beside the
    caller's own shard at most two are held: the one being attended and the one arriving.

    Args:
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        lengths: tokens of each ring rank's shard; those without any are passed on but not yielded.
        group: the ring group.
        side: where shards travel while others are attended.
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
        if lengths[owner]:
            yield owner, *held
        pending.join()
        shape = batch, lengths[next_owner], heads, head_dim
        held = key_part.view(shape), value_part.view(shape)
    last = (rank + 1) % ranks
    if lengths[last]:
        yield last, *held


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
