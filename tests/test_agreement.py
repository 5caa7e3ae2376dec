"""What ranks agree on: values over one group and over several, and actions that fail on some of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from sp_sparse import SequenceParallelMesh
from sp_sparse.parallel.agreement import RefusedError, check_all_same, check_same, every_value, together
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
