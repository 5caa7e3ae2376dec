"""A rank that fails amid a forward is heard by all; the next video is right, or refused."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers.hooks import FirstBlockCacheConfig

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.integrations.diffusers.forward_end import ForwardEnd
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.parallel.agreement import LostRankError, RefusedError, is_lost_rank
from sp_sparse.parallel.failures import Standing
from tests.oracle import relative_error
from tests.ranks import run_ranks, world_group
from tests.tiny_wan import run, tiny_pipeline

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
SOON_S = 15.0
TIMEOUT_S = 4.0
RESTART = "the ranks are out of step since .*; start all ranks anew"

# Ulysses, ring and CFG degrees.
HALVES_OF_TWO, HALVES_OF_RINGS, HYBRID, PAIR = (2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 1)
# Where a forward fails: before its layers, between two, behind the last, behind the last gather.
PLACES = ("condition_embedder", "blocks.0.ffn", "blocks.1.ffn", "proj_out")

_cache: dict[str, Tensor] = {}


def _single() -> Tensor:
    """One rank: computed once in the parent, inherited by forked ranks."""
    if "video" not in _cache:
        pipe = tiny_pipeline("t2v")
        enable_sparse_attention(pipe, CONFIG)
        _cache["video"] = run(pipe)
    return _cache["video"]


def _sparse(degrees: tuple[int, int, int], timeout_s: float = 60.0) -> Any:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees, timeout=timedelta(seconds=timeout_s)))
    return pipe


def _fail_in(module: Any, call: int, error: Exception) -> None:
    """`module` raises after its `call`-th call from now, once."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error

    module.register_forward_hook(hook)


def _check_heard(rank: int, degrees: tuple[int, int, int], failing: int, place: str, expert: str, call: int) -> None:
    pipe = _sparse(degrees)
    if rank == failing:
        _fail_in(getattr(pipe, expert).get_submodule(place), call, torch.OutOfMemoryError("no memory"))
    start = time.monotonic()
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as raised:
        run(pipe)
    assert time.monotonic() - start < SOON_S
    told = f"another rank failed, and with it this step here (rank {failing}: OutOfMemoryError: no memory)"
    assert str(raised.value).startswith("no memory" if rank == failing else told)
    for _ in range(2):
        assert relative_error(run(pipe), _single()) < 2e-5


CASES = [
    *((HALVES_OF_TWO, 3, place, "transformer", 1) for place in PLACES),
    (HALVES_OF_TWO, 0, "blocks.0.ffn", "transformer", 2),
    (HALVES_OF_TWO, 1, "blocks.0.ffn", "transformer_2", 1),
    (HALVES_OF_RINGS, 2, "blocks.0.ffn", "transformer_2", 2),
    (HYBRID, 3, "blocks.0.ffn", "transformer", 1),
    (PAIR, 1, "condition_embedder", "transformer", 1),
    (PAIR, 0, "blocks.1.ffn", "transformer_2", 3),
]


@pytest.mark.parametrize(("degrees", "failing", "place", "expert", "call"), CASES)
def test_a_rank_that_fails_amid_a_forward_is_heard_by_all(
    degrees: tuple[int, int, int], failing: int, place: str, expert: str, call: int
) -> None:
    _single()
    ranks = degrees[0] * degrees[1] * degrees[2]
    run_ranks(ranks, _check_heard, degrees, failing, place, expert, call)


class _FailingKernel(ReferenceKernel):
    """Stands for the reference kernel; fails where it is told to."""

    failing: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _FailingKernel.failing is not None:
            error, _FailingKernel.failing = _FailingKernel.failing, None
            raise error
        return super().__call__(*args, **kwargs)


def _check_half_done(rank: int, degrees: tuple[int, int, int], failing: int) -> None:
    pipe = tiny_pipeline("t2v")
    mesh = SequenceParallelMesh(*degrees, timeout=timedelta(seconds=TIMEOUT_S))
    handle = enable_sparse_attention(pipe, CONFIG, mesh)
    run(pipe, num_inference_steps=2)
    for kernels in {id(layer._kernels): layer._kernels for layer in handle.layers}.values():
        kernels.update(dict.fromkeys(kernels, _FailingKernel()))
    if rank == failing:
        _FailingKernel.failing = torch.OutOfMemoryError("no memory")
    start = time.monotonic()
    if rank == failing:
        with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
            run(pipe)
        assert time.monotonic() - start < TIMEOUT_S
    else:
        named = rf"^the ranks (?:do|did) not all .*: rank {failing}: OutOfMemoryError: no memory, and this one waited"
        with pytest.raises(LostRankError, match=named):
            run(pipe)
        assert time.monotonic() - start < 3 * TIMEOUT_S
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(LostRankError, match=RESTART) as refused:
            run(pipe)
        assert "no memory" in str(refused.value)
        assert time.monotonic() - start < TIMEOUT_S / 2, "refused, not waited for"
        assert is_lost_rank(refused.value)  # by which a server starts its ranks anew
    dist.barrier(world_group())


@pytest.mark.parametrize(("degrees", "failing"), [(PAIR, 1), (HALVES_OF_TWO, 3), (HALVES_OF_TWO, 0)])
def test_a_rank_that_leaves_a_layer_half_done_is_named_and_later_videos_are_refused(
    degrees: tuple[int, int, int], failing: int
) -> None:
    run_ranks(degrees[0] * degrees[2], _check_half_done, degrees, failing)


def _check_cached(rank: int) -> None:
    """A step cache decides which layers run, so what is left of a forward is not known."""
    pipe = _sparse(PAIR, TIMEOUT_S)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if rank == 1:
        _fail_in(pipe.transformer.blocks[0].ffn, 1, torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError if rank == 1 else LostRankError, match="no memory"):
        run(pipe)
    with pytest.raises(LostRankError, match=RESTART):
        run(pipe)
    dist.barrier(world_group())


def test_a_rank_that_fails_under_a_step_cache_is_named() -> None:
    run_ranks(2, _check_cached)


def _check_alike(rank: int) -> None:
    """What all ranks are refused alike leaves nothing half-done."""
    pipe = _sparse(PAIR)
    inputs = {"hidden_states": torch.zeros(1, 16, 4, 8, 8), "timestep": torch.tensor([900])}
    with pytest.raises(ValueError, match="no backward pass"):  # gradients are on, and a layer refuses them
        pipe.transformer(**inputs, encoder_hidden_states=torch.zeros(1, 8, 32))
    assert relative_error(run(pipe), _single()) < 2e-5


def test_what_a_layer_refuses_on_all_ranks_spoils_nothing() -> None:
    _single()
    run_ranks(2, _check_alike)


class _CallOnGpu:
    """A forward whose collectives are none of the host's; it has entered the attention of a layer, or ended well."""

    def __init__(self, layer: int | None) -> None:
        self.is_running, self.is_within, self.layers_done = True, layer is not None, layer
        self.plan = SimpleNamespace(local=torch.empty(0, device="meta"))

    def end(self) -> None:
        self.is_running = False


def _check_on_gpus(rank: int) -> None:
    mesh = SequenceParallelMesh(2)
    memory, other = torch.OutOfMemoryError("no memory"), ValueError("other")
    cases: list[tuple[list[tuple[int, Exception] | None], bool]] = [
        # What happens on ranks 0 and 1: the layer, the error; whether the groups are spoilt.
        ([None, (1, memory)], True),
        ([(0, other), None], True),
        ([(0, memory), (1, memory)], True),
        ([(1, memory), (1, other)], True),
        ([(1, memory), (1, memory)], False),
        ([(0, RefusedError("no", True, "no")), (0, RefusedError("no", True, "no"))], False),
        ([None, None], False),
    ]
    for happens, spoilt in cases:
        standing, mine = Standing(), happens[rank]
        call: Any = _CallOnGpu(None if mine is None else mine[0])
        end = ForwardEnd(None, [], [], call, mesh, standing, lambda: None)
        raised = end(None if mine is None else mine[1])
        assert end(None) is None, "it ends once"
        if mine is not None:
            assert raised is mine[1]
        elif any(happens):
            (first,) = (f"rank {r}: {type(x[1]).__name__}: {x[1]}" for r, x in enumerate(happens) if x is not None)
            assert first in str(raised)
        else:
            assert raised is None
        assert standing.can_meet
        if spoilt:
            with pytest.raises(LostRankError, match=RESTART):
                standing.check()
        else:
            standing.check()


def test_beside_a_gpus_collectives_a_half_done_layer_is_heard_at_once() -> None:
    run_ranks(2, _check_on_gpus)
