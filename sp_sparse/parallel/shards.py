"""Which tokens each rank holds: arithmetic only, the same on every rank, without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`total` things over `parts` holders, the first ones holding one more where it does not divide."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


@dataclass(frozen=True)
class SequenceShards:
    """How many consecutive tokens each rank holds, in the order of the sequence.

    Attributes:
        lengths: tokens a rank, any of which may be 0.
        padding: how many tokens at the end of the sequence are padding, which is never attended.

    Raises:
        ValueError: a negative length, or more padding than tokens.
    """

    lengths: tuple[int, ...]
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 0 or not 0 <= self.padding <= sum(self.lengths):
            raise ValueError(f"lengths {self.lengths} with padding {self.padding}: both must be non-negative and fit")

    @classmethod
    def aligned(cls, length: int, block: int, ulysses_degree: int, ring_degree: int) -> SequenceShards:
        """Our own cut: ring shards at block edges, differing by at most one block; within one, Ulysses shares by tokens."""
        lengths: list[int] = []
        blocks = -(-length // block)
        first = 0
        for count in split_evenly(blocks, ring_degree):
            tokens = min(length, (first + count) * block) - min(length, first * block)
            lengths += split_evenly(tokens, ulysses_degree)
            first += count
        return cls(tuple(lengths))

    @classmethod
    def equal(cls, length: int, ranks: int) -> SequenceShards:
        """A framework's cut: the sequence padded at its end to a multiple of `ranks`, then cut equally."""
        share = -(-length // ranks)
        return cls((share,) * ranks, padding=share * ranks - length)

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """First token of each rank, then the end of the last."""
        return (0, *accumulate(self.lengths))

    @property
    def sequence_length(self) -> int:
        """Tokens without the padding."""
        return self.edges[-1] - self.padding

    def range_of(self, rank: int) -> tuple[int, int]:
        """First token of `rank` and the one after its last, without the padding."""
        return min(self.edges[rank], self.sequence_length), min(self.edges[rank + 1], self.sequence_length)

    def grouped(self, size: int) -> SequenceShards:
        """The shards after every `size` neighbouring ranks have put theirs together."""
        sums = tuple(sum(self.lengths[i : i + size]) for i in range(0, len(self.lengths), size))
        return SequenceShards(sums, self.padding)

    def realigned(self, block: int) -> SequenceShards:
        """The nearest cut without padding in which every rank that holds tokens starts at a multiple of `block`."""
        length = self.sequence_length
        edges = [length if edge >= length else min((edge + block // 2) // block * block, length) for edge in self.edges]
        return SequenceShards(tuple(b - a for a, b in zip(edges[:-1], edges[1:], strict=True)))


def overlap(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """The tokens that two ranges `(first, end)` share; empty where first >= end."""
    return max(a[0], b[0]), min(a[1], b[1])
