"""Guidance on two halves of the ranks, when something fails, is switched off or ends early: every rank hears of it, and the
next video is made right."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.integrations.diffusers.cfg import GuidanceHalves
from sp_sparse.parallel.agreement import RefusedError
from sp_sparse.parallel.failures import Standing
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import run, tiny_pipeline, tiny_transformer

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
SOON_S = 15.0
# Ranks that wait in vain give up before the test's own time is over, so that it tells which of its steps failed.
TIMEOUT_S = 20.0

_cache: dict[tuple[str, str], Tensor] = {}


def _off_after_first(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 0:
        pipe._guidance_scale = 1.0
    return {}


def _off_for_one(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._guidance_scale = 1.0 if step == 1 else 3.0
    return {}


def _off_for_last(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        pipe._guidance_scale = 1.0
    return {}


def _interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return {}


CHANGES: dict[str, dict[str, Any]] = {
    "off after the first step": {"callback_on_step_end": _off_after_first},
    "off for one step": {"callback_on_step_end": _off_for_one},
    "off for the last step": {"callback_on_step_end": _off_for_last},
    "interrupted": {"callback_on_step_end": _interrupt},
    "second expert unguided": {"guidance_scale_2": 1.0},
    "plain": {},
}


def _single(family: str, change: str = "plain") -> Tensor:
    """One rank: computed once in the parent, inherited by forked ranks."""
    if (family, change) not in _cache:
        pipe = tiny_pipeline(family)
        enable_sparse_attention(pipe, CONFIG)
        _cache[family, change] = run(pipe, **CHANGES[change])
    return _cache[family, change]


def _mesh(ulysses: int = 1) -> SequenceParallelMesh:
    return SequenceParallelMesh(ulysses, cfg_degree=2, timeout=timedelta(seconds=TIMEOUT_S))


def _sparse(family: str = "t2v", ulysses: int = 1) -> Any:
    pipe = tiny_pipeline(family)
    enable_sparse_attention(pipe, CONFIG, _mesh(ulysses))
    return pipe


def _check_right(pipe: Any, family: str = "t2v", change: str = "plain") -> None:
    error = relative_error(run(pipe, **CHANGES[change]), _single(family, change))
    assert error < 2e-5, (family, change, error)


def _check_change(rank: int, family: str, change: str) -> None:
    pipe = _sparse(family)
    _check_right(pipe, family, change)
    _check_right(pipe, family)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "plain"])
@pytest.mark.parametrize("family", ["t2v", "i2v"])
def test_guidance_that_changes_gives_what_one_rank_gives(family: str, change: str) -> None:
    expected = _single(family, change)
    assert relative_error(expected, _single(family)) > 1e-4, "the change must matter"
    run_ranks(2, _check_change, family, change)


def _fail_at(module: Any, call: int, error: Exception) -> None:
    """The forward of `module` raises at its `call`-th call from now, once."""
    forward, calls = module.forward, [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return forward(*args, **kwargs)

    module.forward = failing


FAILURES: dict[str, tuple[int, set[int], str, int]] = {
    # what fails -> (Ulysses degree, ranks, expert, call on that rank)
    "both halves": (1, {0, 1}, "transformer", 1),
    "first half": (1, {0}, "transformer", 1),
    "second half": (1, {1}, "transformer", 1),
    "second half, later": (1, {1}, "transformer", 2),
    "first half, second expert": (1, {0}, "transformer_2", 1),
    "second half, last step": (1, {1}, "transformer_2", 2),
    "first half of two ranks": (2, {0, 1}, "transformer", 1),
    "second half of two ranks, second expert": (2, {2, 3}, "transformer_2", 1),
}


def _check_failure(rank: int, ulysses: int, failing: set[int], expert: str, call: int) -> None:
    pipe = _sparse(ulysses=ulysses)
    if rank in failing:
        _fail_at(getattr(pipe, expert).condition_embedder, call, torch.OutOfMemoryError(f"no memory on {rank}"))
    start = time.monotonic()
    with pytest.raises(torch.OutOfMemoryError, match="no memory on") as raised:
        run(pipe)
    assert time.monotonic() - start < SOON_S
    if rank not in failing:
        assert f"rank {min(failing)}: OutOfMemoryError: no memory on {min(failing)}" in str(raised.value)
        assert str(raised.value).endswith("make the video anew")
    _check_right(pipe)
    _check_right(pipe)


@pytest.mark.parametrize("what", FAILURES)
def test_a_failing_half_is_heard_by_all(what: str) -> None:
    _single("t2v")
    ulysses, *rest = FAILURES[what]
    run_ranks(2 * ulysses, _check_failure, ulysses, *rest)


def _check_failing_hook(rank: int, failing: int, branch: str) -> None:
    """Fails before the forward: in a hook of another library, such as one that moves weights."""
    pipe = _sparse()
    asked = [0]

    def hook(*_: Any) -> None:
        asked[0] += 1
        if rank == failing and asked[0] == {"cond": 3, "uncond": 4}[branch]:
            raise ValueError("hook")

    pipe.transformer.register_forward_pre_hook(hook)
    with pytest.raises(ValueError if rank == failing else RuntimeError, match="hook"):
        run(pipe)
    _check_right(pipe)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_hook_is_heard_by_all(failing: int, branch: str) -> None:
    _single("t2v")
    run_ranks(2, _check_failing_hook, failing, branch)


def _check_between(rank: int, failing: set[int]) -> None:
    """Fails where nothing of ours watches: before the context of the second branch is entered."""
    pipe = _sparse()
    cache_context, armed = pipe.transformer.cache_context, [rank in failing]

    @contextmanager
    def failing_context(name: str, **kwargs: Any) -> Any:
        if name == "uncond" and armed[0]:
            armed[0] = False
            raise ValueError("between")
        with cache_context(name, **kwargs):
            yield

    pipe.transformer.cache_context = failing_context
    # One that fails goes on to the next video: there the others learn of it.
    with pytest.raises(ValueError if rank in failing else RuntimeError, match="between"):
        run(pipe)
    _check_right(pipe)
    _check_right(pipe)


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}])
def test_a_failure_between_the_branches_spoils_no_later_video(failing: set[int]) -> None:
    _single("t2v")
    run_ranks(2, _check_between, failing)


def _check_failing_unguided(rank: int) -> None:
    pipe = _sparse()
    if rank == 1:
        # Its first call is the unconditional one of the first step, its second the only one of the next.
        _fail_at(pipe.transformer.condition_embedder, 2, ValueError("unguided"))
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="unguided"):
        run(pipe, **CHANGES["off after the first step"])
    _check_right(pipe)


def test_a_failure_without_guidance_is_heard_by_all() -> None:
    _single("t2v")
    run_ranks(2, _check_failing_unguided)


def _check_refused(rank: int) -> None:
    """What only one rank of a half refuses is refused on all: applications go by that when they compare failures."""
    pipe = _sparse()
    if rank == 1:
        _fail_at(pipe.transformer.condition_embedder, 1, RefusedError("differ", True, "differ"))
    with pytest.raises(RefusedError, match="differ"):
        run(pipe)
    _check_right(pipe)


def test_a_refusal_is_one_on_all_ranks() -> None:
    _single("t2v")
    run_ranks(2, _check_refused)


def _raise(error: Exception) -> Callable[..., Any]:
    def callback(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise error
        return {}

    return callback


def _check_odd_guidance(rank: int, family: str) -> None:
    pipe = _sparse(family)
    # Off at the first step: half of the ranks would have nothing to do.
    with pytest.raises(RuntimeError, match=r"guidance_scale above 1.*cfg_degree=1"):
        run(pipe, guidance_scale=1.0)
    _check_right(pipe, family)
    # On one rank only.
    with pytest.raises(RuntimeError, match=r"ranks differ in whether guidance is on.*rank 0: \(False, "):
        run(pipe, callback_on_step_end=_off_after_first if rank == 0 else None)
    _check_right(pipe, family)
    with pytest.raises(KeyError, match="callback"):
        run(pipe, callback_on_step_end=_raise(KeyError("callback")))
    _check_right(pipe, family)

    def off(*_: Any) -> None:
        pipe._guidance_scale = 1.0

    hook = pipe.transformer.register_forward_hook(off)
    with pytest.raises(RuntimeError, match="callback_on_step_end"):
        run(pipe)
    hook.remove()
    _check_right(pipe, family)
    with pytest.raises(RuntimeError, match=r"None.*cfg_degree=1"):
        pipe.transformer(torch.zeros(1, pipe.transformer.config.in_channels, 4, 8, 8), torch.tensor([900]), None)
    _check_right(pipe, family)


@pytest.mark.parametrize("family", ["t2v", "i2v"])
def test_guidance_that_cannot_be_served_is_refused_on_all_ranks(family: str) -> None:
    _single(family)
    run_ranks(2, _check_odd_guidance, family)


def _check_bare(rank: int) -> None:
    mesh = SequenceParallelMesh(cfg_degree=2)
    model = tiny_transformer()
    keys = set(vars(model))
    with pytest.raises(TypeError, match=r"WanTransformer3DModel does not tell.*pass the pipeline"):
        enable_sparse_attention(model, CONFIG, mesh)
    assert set(vars(model)) == keys


def test_halves_need_the_pipeline_to_know_guidance() -> None:
    run_ranks(2, _check_bare)


def test_a_call_within_ours_ends_no_step_of_its_own() -> None:
    """As where another library's wrapper stands between two of ours, both of which then ask for the branch."""
    pipe, standing, x = SimpleNamespace(do_classifier_free_guidance=False), Standing(), torch.ones(1, 2, 3, 4, 4)
    halves = GuidanceHalves(SequenceParallelMesh(), pipe, standing)

    def inner() -> Tensor:
        return halves.branch("cond", lambda: 2 * x, x, 2)

    with mock.patch.object(standing, "meet", wraps=standing.meet) as meet:
        with halves.watching(lambda name, **_: nullcontext(), lambda: None, lambda: None)("cond", step_index=1):
            assert torch.equal(halves.branch("cond", inner, x, 2), 2 * x)
        assert meet.call_count == 1


def _check_hooks(rank: int, order: str) -> None:
    """accelerate's hooks come and go, as enable_model_cpu_offload places them anew after every video."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls["hook"] += 1
            return args, kwargs

    pipe = tiny_pipeline("t2v")
    models = (pipe.transformer, pipe.transformer_2)
    calls = {"hook": 0, "model": 0}
    for model in models:
        model.condition_embedder.register_forward_hook(lambda *_: calls.update(model=calls["model"] + 1))
    hooked, handle = False, None
    for step in order.split():
        if step == "hook":
            for model in models:
                add_hook_to_module(model, Counting())
            hooked = True
        elif step == "unhook":
            for model in models:
                remove_hook_from_module(model)
            hooked = False
        elif step == "enable":
            handle = enable_sparse_attention(pipe, CONFIG, _mesh())
        elif step == "remove":
            assert handle is not None
            handle.remove()
            handle = None
        else:
            calls.update(hook=0, model=0)
            result = run(pipe)
            assert relative_error(result, _single("t2v") if handle else _dense()) < 2e-5
            assert calls["model"] == (4 if handle else 8), "the halves must share the calls, whatever hooks come and go"
            assert (calls["hook"] > 0) == hooked
    if handle is None and not hooked:
        for model in models:
            assert model.__dict__.get("forward", model.forward).__func__ is type(model).forward
            assert not {"cache_context", "enable_parallelism", "_old_forward"} & set(vars(model))


def _dense() -> Tensor:
    if ("t2v", "dense") not in _cache:
        _cache["t2v", "dense"] = run(tiny_pipeline("t2v"))
    return _cache["t2v", "dense"]


@pytest.mark.parametrize(
    "order",
    [
        "hook enable video unhook video remove video",
        "enable hook video remove video unhook video",
        "enable video hook video unhook hook video unhook video remove video",
        "hook enable video unhook hook video remove video unhook video",
        "hook enable hook video remove video unhook video enable video",
    ],
)
def test_hooks_that_come_and_go(order: str) -> None:
    _single("t2v"), _dense()
    run_ranks(2, _check_hooks, order)
