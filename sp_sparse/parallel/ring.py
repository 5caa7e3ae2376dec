"""Ring attention (arXiv 2310.01889): key/value shards travel while queries stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.streams import Pending, SideStream


def ring_buffers(ranks: int) -> int:
    """Shards of others that a rank holds at most: half of the ring's, but all of up to four ranks.

    One of them is being attended, so exchanges run ahead of attention by one hop less. A rank that is slow at one hop does
    not hold up the others before they are that far ahead, and up to four ranks never wait for each other's attention.
    """
    return min(ranks - 1, max(3, ranks // 2))


def ring_hops(
    key: Tensor, value: Tensor, lengths: Sequence[int], group: ProcessGroup, side: SideStream
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (owner, key, value) of every shard that holds tokens, own first, while the next ones are in flight.

    At hop `h` rank `r` attends the shard of `(r - h) mod R`; exchange `h` sends it to `r + 1` and brings the next one from
    `r - 1`. An exchange is queued as soon as the buffer that it fills has been attended, so a shard may be used only until
    the next one is asked for. Beside the caller's own shard `ring_buffers(R)` of them are held.

    Args:
        key, value: this rank's shard, `[B, S_rank, H, D]`.
        lengths: tokens of each ring rank's shard; those without any are passed on but not yielded.
        group: the ring group.
        side: where shards travel while others are attended.
    """
    rank, ranks = dist.get_rank(group), len(lengths)
    batch, _, heads, head_dim = key.shape
    buffers = ring_buffers(ranks)
    spare = key.new_empty(buffers, 2, batch * max(lengths) * heads * head_dim)
    shards = [(key.contiguous(), value.contiguous())]  # by hop
    flying: list[Pending] = []  # exchanges by hop
    try:
        for hop in range(ranks):
            # What lay in the buffer of exchange `h` is attended at hop `h + 1 - buffers`: that must be queued by now.
            while len(flying) < min(max(hop - 1, 0) + buffers, ranks - 1):
                exchange = len(flying)
                length = lengths[(rank - exchange - 1) % ranks]
                arriving = spare[exchange % buffers, :, : batch * length * heads * head_dim]
                _pass_on(shards[exchange], (arriving[0], arriving[1]), group, side, flying)
                shape = batch, length, heads, head_dim
                shards.append((arriving[0].view(shape), arriving[1].view(shape)))
            if hop > 0:
                flying[hop - 1].join()
            owner = (rank - hop) % ranks
            if lengths[owner]:
                yield owner, *shards[hop]
    finally:
        # Left early, by an exception of the caller's or here: the buffers must not be handed on while shards still arrive.
        for pending in flying:
            pending.join()


def _pass_on(
    outgoing: tuple[Tensor, ...],
    incoming: tuple[Tensor, ...],
    group: ProcessGroup,
    side: SideStream,
    flying: list[Pending],
) -> None:
    """Send to the next rank of the ring and receive from the one before; both keep to all-to-all's order of calls."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with side.run() as pending:
        flying.append(pending)  # first, so that it is joined if a call fails
        for leaving, arriving in zip(outgoing, incoming, strict=True):
            sent, received = [0] * ranks, [0] * ranks
            sent[(rank + 1) % ranks], received[(rank - 1) % ranks] = leaving.numel(), arriving.numel()
            # Between two ranks only, as an all-to-all: point-to-point calls would not run on a stream of ours.
            dist.all_to_all_single(arriving, leaving.view(-1), received, sent, group=group)
