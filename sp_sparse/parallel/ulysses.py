"""Ulysses (arXiv 2309.14509): all-to-all between sequence shards of all heads and whole sequences of some heads.

Neither the heads nor the tokens have to divide by the number of ranks. Exchanges are started and finished apart, so that
those of some heads can be under way while other heads are attended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.shards import split_evenly

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

    work: dist.Work
    send: Tensor  # kept until it is sent
    arriving: Tensor  # [S_group, B, heads, D]

    def finish(self) -> Tensor:
        """`[B, S_group, heads, D]`, contiguous."""
        self.work.wait()
        return self.arriving.transpose(0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class Scattering:
    """Heads of this rank's tokens on their way back."""

    work: dist.Work
    send: Tensor  # kept until it is sent
    arriving: tuple[Tensor, ...]  # from each rank, [S_rank, B, heads, D]
    ranges: HeadRanges

    def finish(self, out: Tensor) -> None:
        """Put the heads in their places in `out`, `[B, S_rank, H, D]`."""
        self.work.wait()
        for part, (first, end) in zip(self.arriving, self.ranges, strict=True):
            out[:, :, first:end] = part.transpose(0, 1)


def start_gather(x: Tensor, tokens: Sequence[int], ranges: HeadRanges, group: ProcessGroup) -> Gathering:
    """`[B, S_rank, H, D]` -> `[B, S_group, heads of this rank, D]`: give away heads, receive tokens.

    Args:
        x: this rank's tokens, all heads.
        tokens: tokens that each rank of the group holds.
        ranges: the heads that each rank of the group is to receive.
        group: the Ulysses group.
    """
    rank = dist.get_rank(group)
    batch, length, _, head_dim = x.shape
    unit = batch * head_dim
    sent = [length * (end - first) * unit for first, end in ranges]
    send = x.new_empty(sum(sent))
    # A message is token-major, so that what arrives is already in sequence order.
    for part, (first, end) in zip(send.split(sent), ranges, strict=True):
        part.view(length, batch, end - first, head_dim).copy_(x[:, :, first:end].transpose(0, 1))
    mine = ranges[rank][1] - ranges[rank][0]
    received = [count * mine * unit for count in tokens]
    arriving = x.new_empty(sum(received))
    work = dist.all_to_all_single(arriving, send, received, sent, group=group, async_op=True)
    assert work is not None  # this rank is of the group
    return Gathering(work, send, arriving.view(sum(tokens), batch, mine, head_dim))


def start_scatter(x: Tensor, tokens: Sequence[int], ranges: HeadRanges, group: ProcessGroup) -> Scattering:
    """The reverse: `[B, S_group, heads of this rank, D]` -> those heads of every rank, for this rank's tokens."""
    rank = dist.get_rank(group)
    batch, _, mine, head_dim = x.shape
    unit = batch * head_dim
    send = x.transpose(0, 1).contiguous().view(-1)
    sent = [count * mine * unit for count in tokens]
    received = [tokens[rank] * (end - first) * unit for first, end in ranges]
    arriving = x.new_empty(sum(received))
    work = dist.all_to_all_single(arriving, send, received, sent, group=group, async_op=True)
    assert work is not None  # this rank is of the group
    parts = tuple(
        part.view(tokens[rank], batch, end - first, head_dim)
        for part, (first, end) in zip(arriving.split(received), ranges, strict=True)
    )
    return Scattering(work, send, parts, ranges)
