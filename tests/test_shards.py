"""Shard arithmetic, and the redistributions between shards on forked ranks: every token and head lands in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sp_sparse import SequenceParallelMesh, SequenceShards
from sp_sparse.mask import num_blocks
from sp_sparse.parallel import collectives
from sp_sparse.parallel.collectives import realign
from sp_sparse.parallel.shards import overlap, split_evenly
from sp_sparse.parallel.strategy import ParallelContext, SequenceParallelStrategy
from sp_sparse.parallel.streams import Pending, SideStream
from sp_sparse.parallel.ulysses import copy_tokens, head_ranges, start_gather, start_scatter
from tests.ranks import run_ranks, world_group

NAN = float("nan")
lengths = st.integers(0, 400)
degrees = st.integers(1, 9)
block_sizes = st.integers(1, 70)


@given(lengths, degrees)
def test_split_evenly(total: int, parts: int) -> None:
    counts = split_evenly(total, parts)
    assert (len(counts), sum(counts)) == (parts, total)
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True), "the first holders have one more"


@given(lengths, block_sizes, degrees, degrees)
def test_aligned(length: int, block: int, ulysses: int, ring: int) -> None:
    shards = SequenceShards.aligned(length, block, ulysses, ring)
    assert (len(shards.lengths), shards.padding, shards.sequence_length) == (ulysses * ring, 0, length)
    per_ring = shards.grouped(ulysses)
    assert all(edge % block == 0 or edge == length for edge in per_ring.edges[:-1])
    blocks = [num_blocks(tokens, block) for tokens in per_ring.lengths]
    assert max(blocks) - min(blocks) <= 1
    for i in range(ring):
        within = shards.lengths[i * ulysses : (i + 1) * ulysses]
        assert max(within) - min(within) <= 1


@given(lengths, st.integers(1, 16))
def test_equal(length: int, ranks: int) -> None:
    shards = SequenceShards.equal(length, ranks)
    assert len(set(shards.lengths)) == 1
    assert shards.sequence_length == length
    assert 0 <= shards.padding < ranks
    ranges = [shards.range_of(rank) for rank in range(ranks)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(ranges)), "the ranges follow each other and hold no padding"


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), block_sizes, st.data())
def test_realigned_moves_an_edge_by_at_most_half_a_block(held: list[int], block: int, data: st.DataObject) -> None:
    source = SequenceShards(tuple(held), data.draw(st.integers(0, min(sum(held), 20))))
    target = source.realigned(block)
    length = source.sequence_length
    assert (target.sequence_length, target.padding, len(target.lengths)) == (length, 0, len(held))
    assert (target.edges[0], target.edges[-1]) == (0, length)
    for before, after in zip(source.edges[1:-1], target.edges[1:-1], strict=True):
        assert after % block == 0 or after == length
        assert 2 * abs(min(before, length) - after) <= block
    aligned = target.realigned(block)
    assert all(e % block == 0 or e == length for e in aligned.edges)


@given(st.integers(1, 300), block_sizes, st.integers(1, 5))
def test_realigned_leaves_an_aligned_cut(length: int, block: int, ring: int) -> None:
    shards = SequenceShards.aligned(length, block, 1, ring)
    if all(e % block == 0 for e in shards.edges[1:-1]):
        assert shards.realigned(block) == shards


def test_known_cuts() -> None:
    assert SequenceShards.aligned(100, 16, 2, 3).lengths == (24, 24, 16, 16, 10, 10)
    assert SequenceShards.equal(10, 4) == SequenceShards((3, 3, 3, 3), padding=2)
    assert SequenceShards((1, 2, 3, 4, 5), padding=2).grouped(2) == SequenceShards((3, 7, 5), padding=2)
    # 720p x 81 frames over ring 8: edges fall off the blocks of 128.
    wan = SequenceShards.equal(75600, 8).realigned(128)
    assert wan.lengths == (9472, 9472, 9344, 9472, 9472, 9472, 9472, 9424)
    assert SequenceShards((9, 9, 9, 9), padding=12).range_of(2) == (18, 24)
    assert SequenceShards((9, 9, 9, 9), padding=12).range_of(3) == (24, 24)
    assert overlap((3, 9), (5, 20)) == (5, 9)
    first, end = overlap((3, 5), (9, 20))
    assert first >= end


@pytest.mark.parametrize(("held", "padding"), [((3, -1), 0), ((3, 4), -1), ((3, 4), 8), ((), 1)])
def test_errors(held: tuple[int, ...], padding: int) -> None:
    with pytest.raises(ValueError, match="must be non-negative and fit"):
        SequenceShards(held, padding)


def _coded(batch: int, length: int, heads: int, head_dim: int = 3) -> Tensor:
    """Every element has a value of its own."""
    shape = (batch, length, heads, head_dim)
    return torch.arange(1, batch * length * heads * head_dim + 1, dtype=torch.float64).view(shape)


def _shard(whole: Tensor, shards: SequenceShards, rank: int, fill: float) -> Tensor:
    """What `rank` holds of `whole`, `fill` in padding."""
    first, last = shards.range_of(rank)
    held = whole.new_full((whole.shape[0], shards.lengths[rank], *whole.shape[2:]), fill)
    held[:, : last - first] = whole[:, first:last]
    return held


REALIGN = [
    (SequenceShards((20, 20, 20)), SequenceShards((16, 32, 12))),
    (SequenceShards((1, 1, 62)), SequenceShards((32, 16, 16))),  # from more than one neighbour away
    (SequenceShards((0, 5, 0)), SequenceShards((5, 0, 0))),
    (SequenceShards((0, 0, 37)), SequenceShards((37, 0, 0))),
    (SequenceShards((13, 13, 13), padding=2), SequenceShards((16, 16, 5))),
    (SequenceShards((8, 8, 8), padding=19), SequenceShards((0, 0, 5))),
    (SequenceShards((4, 4, 4), padding=12), SequenceShards((0, 0, 0))),
    (SequenceShards((7, 7, 7)), SequenceShards((7, 7, 7))),
]


def _check_realign(rank: int) -> None:
    for source, target in REALIGN:
        for before, after in ((source, target), (target, source)):  # there, and back into padding
            for batch in (1, 2):
                whole = _coded(batch, source.sequence_length, 2), -_coded(batch, source.sequence_length, 2)
                held = tuple(_shard(x, before, rank, NAN) for x in whole)
                moved = realign(held, before, after, world_group())
                for x, y in zip(moved, whole, strict=True):
                    assert torch.equal(x, _shard(y, after, rank, 0.0)), (before, after, batch)


def test_realign_puts_every_token_in_its_place() -> None:
    run_ranks(3, _check_realign)


def test_realign_on_one_rank_drops_and_adds_padding() -> None:
    whole = _coded(2, 10, 2)
    padded, exact = SequenceShards((13,), padding=3), SequenceShards((10,))
    (x,) = realign((_shard(whole, padded, 0, NAN),), padded, exact, None)
    assert torch.equal(x, whole)
    (x,) = realign((x,), exact, padded, None)
    assert torch.equal(x, _shard(whole, padded, 0, 0.0))


class _LateWork:
    """A message that arrives, and whose source may be reused, only when it is waited for."""

    def __init__(self, operation: Any, arrived: Tensor | None) -> None:
        self._operation, self._arrived = operation, arrived
        if arrived is not None:
            operation.tensor.fill_(NAN)

    def wait(self) -> None:
        if self._arrived is not None:
            self._operation.tensor.copy_(self._arrived)


def test_realign_waits_for_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _coded(1, 40, 2)
    source, target = SequenceShards((16, 24)), SequenceShards((20, 20))

    def exchange(operations: list[Any]) -> list[_LateWork]:
        return [_LateWork(x, whole[None, :, 16:20] if x.op is dist.irecv else None) for x in operations]

    fake = type("FakeDist", (), {"isend": dist.isend, "irecv": dist.irecv})
    fake.get_rank = staticmethod(lambda group: 0)  # type: ignore[attr-defined]
    fake.get_global_rank = staticmethod(lambda group, rank: rank)  # type: ignore[attr-defined]
    fake.batch_isend_irecv = staticmethod(exchange)  # type: ignore[attr-defined]
    fake.P2POp = type("P2POp", (), {"__init__": _remember_operation})  # type: ignore[attr-defined]
    monkeypatch.setattr(collectives, "dist", fake)
    (x,) = realign((_shard(whole, source, 0, NAN),), source, target, object())  # type: ignore[arg-type]
    assert torch.equal(x, whole[:, :20])


def _remember_operation(self: Any, op: Any, tensor: Tensor, peer: int, group: Any) -> None:
    self.op, self.tensor, self.peer = op, tensor, peer


ULYSSES = [((5, 5, 5), (2, 2, 2)), ((7, 0, 3), (3, 1, 2)), ((0, 0, 4), (1, 1, 1)), ((6, 5, 5), (3, 2, 2))]


def _check_ulysses(rank: int) -> None:
    group, side = world_group(), SideStream(torch.device("cpu"))
    for tokens, heads in ULYSSES:
        shards, first_head = SequenceShards(tokens), sum(heads[:rank])
        for batch in (1, 2):
            whole = _coded(batch, sum(tokens), sum(heads))
            held = _shard(whole, shards, rank, NAN)
            for x in (held, held.transpose(1, 2).contiguous().transpose(1, 2)):
                (ranges,) = head_ranges(heads)
                wanted = whole[:, :, first_head : first_head + heads[rank]]
                gathered, other = start_gather((x, -x), tokens, ranges, group, side).finish()
                assert torch.equal(gathered, wanted), (tokens, heads, batch)
                assert torch.equal(other, -wanted), (tokens, heads, batch)
                back = torch.full_like(held, NAN)
                start_scatter(gathered, back, tokens, ranges, group, side).finish()
                assert torch.equal(back, held), (tokens, heads, batch)


def test_ulysses_puts_every_token_and_head_in_its_place() -> None:
    run_ranks(3, _check_ulysses)


class _Joined(Pending):
    def __init__(self, joins: list[str], name: str) -> None:
        super().__init__()
        self._joins, self._name = joins, name

    def join(self) -> None:
        self._joins.append(self._name)


class _WatchedStream(SideStream):
    """Tells which of its works were joined: on CPUs a missing wait changes no result."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.started, self.joins = 0, list[str]()

    @contextmanager
    def run(self) -> Iterator[Pending]:
        self.started += 1
        yield _Joined(self.joins, str(self.started))


def _check_ulysses_waits(rank: int) -> None:
    strategy = SequenceParallelStrategy(SequenceParallelMesh(2, 1), 8)
    side = _WatchedStream()
    strategy.mesh._side_streams[torch.device("cpu")] = side
    shards = SequenceShards.aligned(16, 8, 2, 1)
    x = torch.ones(1, 8, 4, 8)
    attended: list[list[str]] = []

    exchange = strategy.exchange(x, x, x, shards)
    for q, _, _, _ in exchange:
        attended.append(list(side.joins))
        exchange.give_back(q)
    # Gathering 1, gathering 2 under way, scattering 3, scattering 4.
    assert attended == [["1"], ["1", "2"]]
    assert side.joins == ["1", "2", "3", "4"]
    strategy.post_attention(strategy.pre_attention(x, x, x, shards)[0], ParallelContext(shards, shards, (2, 2)))
    assert side.joins[4:] == ["5", "6"]


def test_ulysses_waits_for_what_it_uses() -> None:
    run_ranks(2, _check_ulysses_waits)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.bfloat16, 6), (torch.float64, 3)])
def test_copies_by_words_only_where_words_fit(dtype: torch.dtype, head_dim: int) -> None:
    """Odd dimensions, and views that start or step amid a word."""
    whole = torch.randn(2, 5, 6, head_dim + 8).to(dtype)
    for source in (whole, whole[:, 1::2, 1:4, :head_dim], whole[..., 2 : head_dim + 2], whole.transpose(1, 2)):
        target = torch.full(source.shape, NAN, dtype=dtype)
        copy_tokens(target, source)
        assert torch.equal(target, source)


# (cut of the ranks, block): realigned over the ring after gathering; the third moves tokens past a whole neighbour.
STRATEGY = [
    (SequenceShards.equal(75, 6), 16),
    (SequenceShards((3, 4, 0, 5, 30, 2)), 8),
    (SequenceShards((1, 1, 1, 1, 1, 45)), 16),
    (SequenceShards.equal(11, 6), 16),
    (SequenceShards.equal(91, 6), 16),  # at block edges already, but padded
    (SequenceShards.aligned(75, 16, 2, 3), 16),
]


def _check_strategy(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    assert mesh.sequence_rank == rank
    for shards, block in STRATEGY:
        strategy = SequenceParallelStrategy(mesh, block)
        whole = [_coded(2, shards.sequence_length, 5) * sign for sign in (1, -1, 0.5)]
        held = [_shard(x, shards, rank, NAN) for x in whole]
        q, k, v, ring_shards, context = strategy.pre_attention(held[0], held[1], held[2], shards)
        assert all(e % block == 0 or e == shards.sequence_length for e in ring_shards.edges[:-1])
        assert ring_shards.padding == 0
        first, last = ring_shards.range_of(mesh.ring_rank)
        heads = strategy.heads(5)
        first_head = sum(heads[: mesh.ulysses_rank])
        for x, y in zip((q, k, v), whole, strict=True):
            assert torch.equal(x, y[:, first:last, first_head : first_head + heads[mesh.ulysses_rank]]), shards
        back = strategy.post_attention(q, context)
        assert torch.equal(back, _shard(whole[0], shards, rank, 0.0)), shards
        # Block summaries of all ring shards, in order and without the filler of the uneven ones.
        size = block // 2
        starts = (
            torch.arange(0, shards.sequence_length, size, dtype=torch.float32).view(1, 1, -1, 1).expand(2, 3, -1, 4)
        )
        starts = starts + torch.arange(2).view(2, 1, 1, 1) * 1000
        gathered = strategy.gather_blocks(starts[:, :, first // size : num_blocks(last, size)], ring_shards, size)
        assert torch.equal(gathered, starts), shards


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_strategy_round_trip(ulysses: int, ring: int) -> None:
    if ulysses > 5:
        with pytest.raises(ValueError, match="5 heads cannot be split over ulysses_degree=6; use at most 5"):
            SequenceParallelStrategy(_fake_mesh(ulysses), 16).heads(5)
        return
    run_ranks(ulysses * ring, _check_strategy, ulysses, ring)


def _fake_mesh(ulysses: int) -> SequenceParallelMesh:
    mesh = SequenceParallelMesh()
    object.__setattr__(mesh, "ulysses_degree", ulysses)
    return mesh


def test_strategy_refuses_shards_that_do_not_fit() -> None:
    strategy = SequenceParallelStrategy(SequenceParallelMesh(), 16)
    x = torch.zeros(1, 10, 2, 4)
    with pytest.raises(ValueError, match="shards for 2 ranks were given to a mesh of 1; cut the sequence for 1"):
        strategy.pre_attention(x, x, x, SequenceShards((5, 5)))
    with pytest.raises(ValueError, match=r"rank 0 holds 10 tokens but its shard of \(11,\) is 11; cut the sequence"):
        strategy.pre_attention(x, x, x, SequenceShards((11,)))
