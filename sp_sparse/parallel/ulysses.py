"""Ulysses (arXiv 2309.14509): all-to-all between sequence shards of all heads and whole sequences of some heads.

Neither the heads nor the tokens have to divide by the number of ranks. Exchanges are started and finished apart, so that
those of some heads can be under way while other heads are attended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.shards import split_evenly
from sp_sparse.parallel.streams import Pending, SideStream

# The heads of each rank of the group: (first, end) in the numbering of all heads.
HeadRanges = Sequence[tuple[int, int]]


def head_ranges(heads: Sequence[int], chunks: int = 1) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Cut each rank's heads into `chunks` runs; for each chunk, the run of each rank."""
    firsts = (0, *accumulate(heads))
    of_rank = []
    for first, count in zip(firsts, heads, strict=False):
        edges = (0, *accumulate(split_evenly(count, chunks)))
        of_rank.append([(first + a, first + b) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    return tuple(zip(*of_rank, strict=True))


@dataclass(frozen=True, eq=False)
class Gathering:
    """Tokens of some heads on their way to this rank."""

    pending: Pending
    send: Tensor  # kept until it is sent
    arriving: Tensor  # [S_group, B, tensors, heads, D]

    def finish(self) -> tuple[Tensor, ...]:
        """The tensors, `[B, S_group, heads, D]` each; contiguous if there is only one."""
        self.pending.join()
        return tuple(self.arriving[:, :, i].transpose(0, 1) for i in range(self.arriving.shape[2]))


@dataclass(frozen=True, eq=False)
class Scattering:
    """Heads of this rank's tokens on their way back."""

    pending: Pending
    kept: tuple[Tensor, ...]  # what is sent and what arrives, until it is in its place

    def finish(self) -> None:
        self.pending.join()


def start_gather(
    tensors: Sequence[Tensor], tokens: Sequence[int], ranges: HeadRanges, group: ProcessGroup, side: SideStream
) -> Gathering:
    """`[B, S_rank, H, D]` each -> `[B, S_group, heads of this rank, D]` each: give away heads, receive tokens.

    Args:
        tensors: this rank's tokens, all heads; all of them travel in one exchange.
        tokens: tokens that each rank of the group holds.
        ranges: the heads that each rank of the group is to receive.
        group: the Ulysses group.
        side: where the exchange runs.
    """
    rank = dist.get_rank(group)
    like, count = tensors[0], len(tensors)
    batch, length, _, head_dim = like.shape
    unit = batch * count * head_dim
    sent = [length * (end - first) * unit for first, end in ranges]
    mine = ranges[rank][1] - ranges[rank][0]
    received = [held * mine * unit for held in tokens]
    send, arriving = like.new_empty(sum(sent)), like.new_empty(sum(received))
    with side.run() as pending:
        # A message is token-major, so that what arrives is already in sequence order.
        for part, (first, end) in zip(send.split(sent), ranges, strict=True):
            packed = part.view(length, batch, count, end - first, head_dim)
            for i, x in enumerate(tensors):
                copy_tokens(packed[:, :, i], x[:, :, first:end].transpose(0, 1))
        dist.all_to_all_single(arriving, send, received, sent, group=group)
    return Gathering(pending, send, arriving.view(sum(tokens), batch, count, mine, head_dim))


def start_scatter(
    x: Tensor, out: Tensor, tokens: Sequence[int], ranges: HeadRanges, group: ProcessGroup, side: SideStream
) -> Scattering:
    """The reverse: `x`, `[B, S_group, heads of this rank, D]`, to `out`, those heads of every rank for this rank's tokens.

    Args:
        x: what this rank attended.
        out: `[B, S_rank, H, D]`; the heads in `ranges` are written.
        tokens, ranges, group, side: as for `start_gather`.
    """
    rank = dist.get_rank(group)
    batch, _, mine, head_dim = x.shape
    unit = batch * head_dim
    sent = [count * mine * unit for count in tokens]
    received = [tokens[rank] * (end - first) * unit for first, end in ranges]
    arriving = x.new_empty(sum(received))
    send = x.transpose(0, 1).contiguous().view(-1)
    with side.run() as pending:
        dist.all_to_all_single(arriving, send, received, sent, group=group)
        for part, (first, end) in zip(arriving.split(received), ranges, strict=True):
            copy_tokens(out[:, :, first:end].transpose(0, 1), part.view(tokens[rank], batch, end - first, head_dim))
    return Scattering(pending, (send, arriving))


def copy_tokens(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, eight bytes at a time where that is possible: twice as fast for a strided bf16 tensor."""
    wide = torch.int64
    share = wide.itemsize // target.element_size()
    if share > 1 and all(_widens(x, share) for x in (target, source)):
        target, source = target.view(wide), source.view(wide)
    target.copy_(source)


def _widens(x: Tensor, share: int) -> bool:
    return x.stride(-1) == 1 and not any(n % share for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
