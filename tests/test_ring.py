"""The ring's schedule: who holds which shard at which hop, and that nothing is read or reused before it has arrived."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sp_sparse.parallel import ring as ring_module
from sp_sparse.parallel.merge import PartialResults
from sp_sparse.parallel.ring import ring_hops
from sp_sparse.parallel.streams import SideStream
from tests.cases import random_tensors
from tests.oracle import assert_close, masked_attention, relative_error
from tests.ranks import run_ranks, world_group

NAN = float("nan")
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
    """Stands for `torch.distributed` and the side stream as rank `rank` of a ring sees them; messages live until `join`."""

    def __init__(self, rank: int, shards: list[tuple[Tensor, Tensor]]) -> None:
        self.rank, self.shards, self.hop = rank, shards, 0
        self.flying: list[tuple[Tensor, Tensor]] = []  # (leaving, arriving)

    def get_rank(self, group: object) -> int:
        return self.rank

    def get_world_size(self, group: object) -> int:
        return len(self.shards)

    @contextmanager
    def run(self) -> Iterator[_FakeNetwork]:
        yield self

    def all_to_all_single(
        self, arriving: Tensor, leaving: Tensor, received: list[int], sent: list[int], group: object
    ) -> None:
        ranks = len(self.shards)
        assert [i for i, n in enumerate(sent) if n] == [(self.rank + 1) % ranks]
        assert [i for i, n in enumerate(received) if n] == [(self.rank - 1) % ranks]
        assert (sum(sent), sum(received)) == (leaving.numel(), arriving.numel())
        arriving.fill_(NAN)
        self.flying.append((leaving, arriving))

    def join(self) -> None:
        ranks = len(self.shards)
        going, coming = self.shards[(self.rank - self.hop) % ranks], self.shards[(self.rank - self.hop - 1) % ranks]
        self.hop += 1
        for (leaving, arriving), sent, received in zip(self.flying, going, coming, strict=True):
            assert torch.equal(leaving, sent.flatten()), "a shard was overwritten while it was being sent"
            arriving.copy_(received.flatten())
        self.flying = []


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_every_message_is_waited_for_before_its_memory_is_used(ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [(torch.full((1, 2, 1, 1), i + 0.25), torch.full((1, 2, 1, 1), i + 0.5)) for i in range(ring)]
    for rank in range(ring):
        network = _FakeNetwork(rank, shards)
        monkeypatch.setattr(ring_module, "dist", network)
        seen: list[tuple[float, float, int]] = []
        in_flight: list[int] = []
        for owner, k, v in ring_hops(*shards[rank], (2,) * ring, object(), network):  # type: ignore[arg-type]
            seen.append((k[0, 0, 0, 0].item(), v[0, 0, 0, 0].item(), owner))
            in_flight.append(len(network.flying))
        owners = [(rank - hop) % ring for hop in range(ring)]
        assert seen == [(owner + 0.25, owner + 0.5, owner) for owner in owners]
        assert in_flight == [2] * (ring - 1) + [0], "the next shard travels while this one is attended"
        assert not network.flying
