"""What ranks agree on: values over one group and over several, and actions that fail on some of them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sp_sparse import SequenceParallelMesh, SparseAttention, SparseAttentionConfig
from sp_sparse.parallel.agreement import (
    LostRankError,
    RefusedError,
    check_all_same,
    check_call,
    check_same,
    every_value,
    is_lost_rank,
    says_lost_rank,
    together,
)
from sp_sparse.parallel.collectives import from_first
from tests.ranks import run_ranks, world_group


def test_a_process_alone_agrees_with_itself() -> None:
    assert every_value("x", ()) == {0: "x"}
    assert together(lambda: 7, ()) == 7
    check_same("anything", object(), ())
    with pytest.raises(RefusedError, match=r"^no$") as refusal:
        together(lambda: _fail("no"), ())
    assert (refusal.value.speaks, refusal.value.failure) == (True, "rank 0: ValueError: no")
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, (), (ValueError,))


def _fail(text: str) -> Any:
    raise ValueError(text)


def _check_values(rank: int) -> None:
    # No group of this mesh holds all four ranks.
    groups = SequenceParallelMesh(2, 2).groups
    assert [dist.get_world_size(group) for group in groups] == [2, 2]
    assert every_value(rank * 10, groups) == {0: 0, 1: 10, 2: 20, 3: 30}
    check_same("alike", "same", groups)
    expected = (
        r"ranks differ in b \(rank 0: 0; rank 1: 0; rank 2: 1; rank 3: 1\); start every rank with the same arguments"
    )
    with pytest.raises(RefusedError, match=expected) as refusal:
        check_all_same({"a": 1, "b": rank // 2}, groups)
    assert refusal.value.speaks


def test_values_over_several_groups() -> None:
    run_ranks(4, _check_values)


def _check_actions(rank: int) -> None:
    groups = (world_group(),)
    assert together(lambda: rank, groups) == rank
    # One rank fails: all do, and the first one tells of it beside the one that failed.
    with pytest.raises(RefusedError) as refusal:
        together(lambda: _fail("full") if rank == 1 else rank, groups)
    assert (str(refusal.value), refusal.value.speaks) == [("rank 1: full", True), ("full", True)][rank]
    assert refusal.value.failure == "rank 1: ValueError: full"
    # All fail alike: it is told once.
    with pytest.raises(RefusedError, match=r"^full$") as refusal:
        together(lambda: _fail("full"), groups)
    assert refusal.value.speaks == (rank == 0)
    # What is refused within is known to all already.
    with pytest.raises(RefusedError, match=r"^ranks differ in rank \(") as refusal:
        together(lambda: check_same("rank", rank, groups), groups)
    assert refusal.value.speaks


def test_an_action_that_fails_on_one_rank_fails_on_all() -> None:
    run_ranks(2, _check_actions)


def _check_calls(rank: int) -> None:
    groups, device = SequenceParallelMesh(2, 2).groups, torch.device("cpu")
    check_call({"a": 1, "b": "x"}, groups, device, "do the same")
    with pytest.raises(RefusedError, match=r"^ranks differ in b \(rank 0: 0; .*; rank 3: 1\); do the same$"):
        check_call({"a": 1, "b": rank // 3}, groups, device, "do the same")
    mine = torch.full((2, 3), rank).t()
    assert from_first(mine, groups).eq(0).all()
    assert mine.eq(rank).all()
    expanded = torch.tensor(rank).expand(4)
    assert from_first(expanded, groups).eq(0).all()


def test_calls_and_tensors_over_several_groups() -> None:
    run_ranks(4, _check_calls)


def _check_lost_rank(rank: int) -> None:
    mesh = SequenceParallelMesh(2, timeout=timedelta(seconds=2))
    with pytest.raises(ValueError, match=r"^mine$"), says_lost_rank("x"):
        _fail("mine")
    with pytest.raises(RuntimeError, match=r"^no rank was lost$"), says_lost_rank("x"):
        raise RuntimeError("no rank was lost")
    if rank == 0:
        with pytest.raises(LostRankError, match=r"^outer: another rank failed") as lost, says_lost_rank("outer"):
            mesh.check_same("x", 1)
        assert is_lost_rank(lost.value)
        with pytest.raises(LostRankError, match=r"^outer"), says_lost_rank("again"):
            raise lost.value
    dist.barrier(world_group())


def test_a_lost_rank_is_told_in_a_sentence() -> None:
    run_ranks(2, _check_lost_rank)


def _check_layer(rank: int) -> None:
    config = SparseAttentionConfig(backend="reference", topk=0.4, schedule="conservative", block_size=(8, 8))
    grid = (3, 5, 7)
    mesh = SequenceParallelMesh(ring_degree=2)
    layer = SparseAttention(config, mesh, num_heads=4, head_dim=8, layer=1)
    first, last = layer.shards(grid).range_of(mesh.sequence_rank)
    q, k, v = (torch.randn(1, 105, 4, 8)[:, first:last] for _ in range(3))
    cases: list[tuple[str, dict[str, Any], torch.dtype]] = [
        # One rank dense, the other sparse; then both sparse, of different density.
        (r"step \(rank 0: 9; rank 1: 10\)", {"step": 9 + rank, "num_steps": 40}, torch.float32),
        (r"number of steps \(rank 0: 40; rank 1: 41\)", {"step": 12, "num_steps": 40 + rank}, torch.float32),
        (r"scale", {"step": 12, "num_steps": 40, "scale": 0.1 + rank}, torch.float32),
        (r"grid \(rank 0: \(3, 5, 7\); rank 1: \(5, 3, 7\)\)", {"step": 0, "num_steps": 4}, torch.float32),
        (r"dtype", {"step": 0, "num_steps": 4}, torch.float64 if rank else torch.float32),
    ]
    for text, told, dtype in cases:
        start = time.monotonic()
        other = (5, 3, 7) if rank and "grid" in text else grid
        with pytest.raises(RefusedError, match=f"ranks differ in {text}.*; make the same call on every rank"):
            layer(q.to(dtype), k.to(dtype), v.to(dtype), grid=other, **told)
        assert time.monotonic() - start < 5
    assert layer(q, k, v, grid=grid, step=9, num_steps=40).isfinite().all()


def test_a_layer_called_otherwise_on_each_rank_refuses() -> None:
    run_ranks(2, _check_layer)
