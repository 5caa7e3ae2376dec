"""The ring's schedule: who holds which shard at which hop, and that nothing is read or reused before it has arrived."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import Tensor

from sp_sparse.parallel import ring as ring_module
from sp_sparse.parallel.merge import PartialResults
from sp_sparse.parallel.ring import ring_buffers, ring_hops
from sp_sparse.parallel.streams import SideStream
from tests.cases import random_tensors
from tests.oracle import assert_close, masked_attention, relative_error
from tests.ranks import run_ranks, world_group

SIDE = SideStream(torch.device("cpu"))
LENGTHS: dict[int, list[tuple[int, ...]]] = {
    3: [(4, 4, 4), (5, 0, 2), (0, 0, 3)],
    4: [(1, 2, 3, 4), (0, 6, 0, 1)],
    8: [(3, 1, 0, 2, 2, 0, 5, 1)],
}


def _check_ring(rank: int, ring: int) -> None:
    """Every hop sees the shard it names, and the merged result is attention over all of them."""
    for held in LENGTHS[ring]:
        _, key, value = random_tensors(2, 1, sum(held), 3, 8, sum(held), torch.float64)
        query = random_tensors(2, 6, 1, 3, 8, rank, torch.float64)[0]
        edges = [sum(held[:i]) for i in range(ring + 1)]
        owners: list[int] = []
        mine = slice(edges[rank], edges[rank + 1])
        results = PartialResults(sum(length > 0 for length in held), torch.float64)
        for owner, k, v in ring_hops(key[:, mine], value[:, mine], held, world_group(), SIDE):
            part = slice(edges[owner], edges[owner + 1])
            assert torch.equal(k, key[:, part]), (rank, owner)
            assert torch.equal(v, value[:, part]), (rank, owner)
            owners.append(owner)
            mask = torch.ones(2, 3, 6, k.shape[1], dtype=torch.bool)
            results.add(*masked_attention(query, k, v, mask, 0.3))
        out, lse = results.out, results.lse
        assert owners == [(rank - hop) % ring for hop in range(ring) if held[(rank - hop) % ring]]
        everything = torch.ones(2, 3, 6, sum(held), dtype=torch.bool)
        expected, expected_lse = masked_attention(query, key, value, everything, 0.3)
        assert relative_error(out, expected) < 1e-14
        assert relative_error(lse, expected_lse) < 1e-14
    empty = torch.zeros(2, 0, 3, 8)
    assert not list(ring_hops(empty, empty, (0,) * ring, world_group(), SIDE))
    with pytest.raises(ValueError, match="every shard of the ring is empty"):
        PartialResults(0, torch.float32).out  # noqa: B018


@pytest.mark.parametrize("ring", LENGTHS)
def test_every_hop_holds_the_shard_it_names(ring: int) -> None:
    run_ranks(ring, _check_ring, ring)


def _check_half_precision(rank: int, ring: int) -> None:
    """Partial results add up in fp32: eight hops err hardly more than one rounding to bf16."""
    query, key, value = random_tensors(1, 40, 40 * ring, 3, 16, 1, torch.bfloat16)
    mine = slice(40 * rank, 40 * (rank + 1))
    results = PartialResults(ring, torch.bfloat16)
    for _, k, v in ring_hops(key[:, mine], value[:, mine], (40,) * ring, world_group(), SIDE):
        out, lse = masked_attention(query, k, v, torch.ones(1, 3, 40, 40, dtype=torch.bool), 0.1, torch.float32)
        results.add(out.bfloat16(), lse)
    out, lse = results.out, results.lse
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    everything = torch.ones(1, 3, 40, 40 * ring, dtype=torch.bool)
    expected, expected_lse = masked_attention(query, key, value, everything, 0.1)
    assert_close(out, expected, relative_error(expected.bfloat16(), expected))
    assert_close(lse, expected_lse, relative_error(expected_lse.float(), expected_lse), 16)


def test_partial_results_add_up_in_fp32() -> None:
    run_ranks(8, _check_half_precision, 8)


class _FakeNetwork:
    """Stands for `torch.distributed` and the side stream as rank `rank` of a ring sees them.

    Exchanges keep their order, as on a stream. They are either done as soon as they are queued, which shows a buffer that
    is filled before it has been attended, or only when they are joined, which shows one that is read before.
    """

    def __init__(self, rank: int, shards: list[tuple[Tensor, ...]], at_once: bool, fails_at: int = -1) -> None:
        self.rank, self.shards, self.at_once, self.fails_at = rank, shards, at_once, fails_at
        self.queued: list[_FakePending] = []
        self.done = 0

    def get_rank(self, group: object) -> int:
        return self.rank

    def get_world_size(self, group: object) -> int:
        return len(self.shards)

    @contextmanager
    def run(self) -> Iterator[_FakePending]:
        self.queued.append(_FakePending(self))
        yield self.queued[-1]
        if self.at_once:
            self.finish(len(self.queued))

    def all_to_all_single(
        self, arriving: Tensor, leaving: Tensor, received: list[int], sent: list[int], group: object
    ) -> None:
        ranks = len(self.shards)
        assert [i for i, n in enumerate(sent) if n] == [(self.rank + 1) % ranks]
        assert [i for i, n in enumerate(received) if n] == [(self.rank - 1) % ranks]
        assert (sum(sent), sum(received)) == (leaving.numel(), arriving.numel())
        if len(self.queued) - 1 == self.fails_at:
            raise RuntimeError("a rank was lost")
        self.queued[-1].messages.append((leaving, arriving))

    def finish(self, count: int) -> None:
        """Do the first `count` exchanges."""
        ranks = len(self.shards)
        while self.done < count:
            going, coming = (self.shards[(self.rank - self.done - i) % ranks] for i in (0, 1))
            for (leaving, arriving), sent, received in zip(
                self.queued[self.done].messages, going, coming, strict=False
            ):
                assert torch.equal(leaving, sent.flatten()), "a shard was overwritten before it was sent on"
                arriving.copy_(received.flatten())
            self.done += 1


class _FakePending:
    def __init__(self, network: _FakeNetwork) -> None:
        self.network, self.messages, self.joined = network, list[tuple[Tensor, Tensor]](), False

    def join(self) -> None:
        self.joined = True
        self.network.finish(self.network.queued.index(self) + 1)


def _numbered_shards(ring: int) -> list[tuple[Tensor, ...]]:
    return [(torch.full((1, 2, 1, 1), i + 0.25), torch.full((1, 2, 1, 1), i + 0.5)) for i in range(ring)]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("ring", [2, 3, 4, 5, 8])
def test_no_buffer_is_read_too_early_or_filled_too_early(
    ring: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _numbered_shards(ring)
    for rank in range(ring):
        network = _FakeNetwork(rank, shards, at_once)
        monkeypatch.setattr(ring_module, "dist", network)
        seen: list[tuple[float, float, int]] = []
        queued: list[int] = []
        memory: set[int] = set()
        for owner, k, v in ring_hops(*shards[rank], (2,) * ring, object(), network):  # type: ignore
            seen.append((k[0, 0, 0, 0].item(), v[0, 0, 0, 0].item(), owner))
            queued.append(len(network.queued))
            memory.add(k.data_ptr())
        owners = [(rank - hop) % ring for hop in range(ring)]
        assert seen == [(owner + 0.25, owner + 0.5, owner) for owner in owners]
        buffers = ring_buffers(ring)
        assert len(memory) == 1 + buffers
        ahead = [min(max(hop - 1, 0) + buffers, ring - 1) for hop in range(ring)]
        assert queued == ahead, "exchanges run as far ahead of attention as there are buffers"
        assert all(exchange.joined for exchange in network.queued)


def test_buffers_are_bounded() -> None:
    assert [ring_buffers(ranks) for ranks in range(1, 9)] == [0, 1, 2, 3, 3, 3, 3, 4]
    assert all(2 * ring_buffers(ranks) <= ranks for ranks in range(6, 65))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("ring", [2, 3, 8])
def test_leaving_early_waits_for_every_exchange(ring: int, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else memory would be handed on that a shard still arrives in."""
    shards = _numbered_shards(ring)
    for hop in range(ring):
        network = _FakeNetwork(1, shards, at_once)
        monkeypatch.setattr(ring_module, "dist", network)
        hops = ring_hops(*shards[1], (2,) * ring, object(), network)  # type: ignore
        for _ in range(hop + 1):
            next(hops)
        hops.close()  # type: ignore[attr-defined]
        assert network.queued
        assert all(exchange.joined for exchange in network.queued)


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_an_exchange_that_fails_waits_for_those_before_it(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = _numbered_shards(8)
    network = _FakeNetwork(1, shards, at_once=False, fails_at=fails_at)
    monkeypatch.setattr(ring_module, "dist", network)
    with pytest.raises(RuntimeError, match="a rank was lost"):
        list(ring_hops(*shards[1], (2,) * 8, object(), network))  # type: ignore
    assert [exchange.joined for exchange in network.queued] == [True] * (fails_at + 1)


@pytest.mark.gpu
def test_work_that_fails_on_the_side_stream_can_be_joined() -> None:
    """What was queued before the failure still writes; memory must not be handed on before it has."""
    device = torch.device("cuda", torch.cuda.current_device())
    side, target = SideStream(device), torch.zeros(1 << 20, device=device)
    with suppress(ValueError), side.run() as pending:
        torch.cuda._sleep(100_000_000)
        target.fill_(1)
        raise ValueError("half-way")
    pending.join()
    assert target.clone().sum().item() == target.numel()
