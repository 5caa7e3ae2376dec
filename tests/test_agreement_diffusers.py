"""Ranks of a Wan pipeline cannot disagree: inputs, noise, steps, caches and loops, whatever each rank was given."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.generate.__main__ import main as generate
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.integrations.diffusers.position import SchedulerSteps
from sp_sparse.parallel.agreement import LostRankError, RefusedError, is_lost_rank
from tests.oracle import relative_error
from tests.ranks import run_ranks, world_group
from tests.tiny_wan import SIZE, run, tiny_pipeline, tiny_transformer

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "lcm": lambda: FlowMatchLCMScheduler(shift=5.0),
    "stochastic euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
}


def _from_global_noise(pipe: Any, seed: int, **more: Any) -> Tensor:
    """As the README's program: no generator is passed, so each rank draws its own noise."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "blurry", "num_inference_steps": 3}
    arguments |= {"guidance_scale": 3.0, "max_sequence_length": 16, "output_type": "latent", **SIZE, **more}
    if "ImageToVideo" in type(pipe).__name__:
        from PIL import Image

        arguments["image"] = Image.new("RGB", (SIZE["width"], SIZE["height"]), "red")
    latents: Tensor = pipe(**arguments).frames
    return latents


def _every(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks."""
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.contiguous())
    return every


def _check_noise(rank: int, family: str, dtype: torch.dtype, degrees: tuple[int, int, int], expected: Tensor) -> None:
    pipe = tiny_pipeline(family)
    for model in (pipe.transformer, pipe.transformer_2):
        model.to(dtype)
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees))
    every = _every(_from_global_noise(pipe, seed=rank))
    assert all(torch.equal(every[0], other) for other in every)
    assert relative_error(every[0], expected) < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("degrees", MESHES)
@pytest.mark.parametrize(("family", "dtype"), [("t2v", torch.float32), ("i2v", torch.bfloat16)])
def test_noise_without_a_seed_is_the_first_ranks(
    family: str, dtype: torch.dtype, degrees: tuple[int, int, int]
) -> None:
    pipe = tiny_pipeline(family)
    for model in (pipe.transformer, pipe.transformer_2):
        model.to(dtype)
    enable_sparse_attention(pipe, CONFIG)
    run_ranks(2, _check_noise, family, dtype, degrees, _from_global_noise(pipe, seed=0))


def _check_inputs(rank: int) -> None:
    model = tiny_transformer()
    given = _inputs(model, seed=rank, timestep=900 - rank)
    # Latents that differ by rounding, which a GPU's encoder may.
    given["hidden_states"] = _inputs(model, seed=0)["hidden_states"] * (1 + 1e-3 * rank)
    kept = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    with torch.no_grad():
        with enable_sparse_attention(model, CONFIG):
            expected = model(**_inputs(model, seed=0, timestep=900))[0]
        enable_sparse_attention(model, CONFIG, SequenceParallelMesh(2, 2))
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        out = model(**given)[0]
        # Arguments by their places, too.
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        again = model(*(given[name] for name in names), return_dict=False)[0]
    assert relative_error(out, expected) < 1e-4
    assert torch.equal(out, again)
    assert all(torch.equal(given[name], x) for name, x in kept.items()), "the caller's tensors were changed"


def test_a_transformer_alone_runs_the_first_ranks_inputs() -> None:
    run_ranks(4, _check_inputs)


def _check_kept_latents(rank: int) -> None:
    """The loop of a pipeline whose transformers alone were made sparse keeps each rank's own latents."""
    pipe = tiny_pipeline("t2v")
    mesh = SequenceParallelMesh(2, 2)
    for model in (pipe.transformer, pipe.transformer_2):
        enable_sparse_attention(model, CONFIG, mesh)
    every = _every(run(pipe))
    assert all(torch.equal(every[0], other) for other in every)
    text = r"ranks differ in hidden_states, .*rank 0: 0%; rank 1: 1[0-9]{2}%.*; seed the noise alike"
    with pytest.raises(RefusedError, match=text):
        _from_global_noise(pipe, seed=rank)


def test_latents_that_nobody_makes_alike_are_refused() -> None:
    run_ranks(4, _check_kept_latents)


def _inputs(model: Any, seed: int = 0, timestep: int = 900, side: int = 8, batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, model.config.in_channels, 4, side, side, generator=generator),
        "timestep": torch.tensor([timestep] * batch),
        "encoder_hidden_states": torch.randn(batch, 8, 32, generator=generator),
        "return_dict": False,
    }


def _check_settings(rank: int) -> None:
    model = tiny_transformer()
    enable_sparse_attention(model, CONFIG, SequenceParallelMesh(ring_degree=2))
    double = {**_inputs(model), "encoder_hidden_states": torch.randn(1, 8, 32, dtype=torch.float64)}
    cached = FirstBlockCacheConfig(threshold=0.1 + 0.1 * rank)
    model.enable_cache(cached)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        (r"step cache \(rank 0: .*0\.1.*; rank 1: .*0\.2", {}, _inputs(model)),
        (r"step \(rank 0: 1; rank 1: 2\)", {"step_index": 1 + rank, "num_inference_steps": 4}, _inputs(model)),
        (
            r"number of steps \(rank 0: 4; rank 1: 5\)",
            {"step_index": 1, "num_inference_steps": 4 + rank},
            _inputs(model),
        ),
        (r"grid \(rank 0: \(4, 4, 4\); rank 1: \(4, 5, 5\)\)", {}, _inputs(model, side=8 + 2 * rank)),
        (r"hidden_states \(rank 0: \(\(1, ", {}, _inputs(model, batch=1 + rank)),
        (r"encoder_hidden_states \(.*float64", {}, double if rank else _inputs(model)),
        (r"guidance branch \(rank 0: 'cond'; rank 1: 'uncond'\)", {}, _inputs(model)),
    ]
    for expected, told, inputs in cases:
        start = time.monotonic()
        branch = "uncond" if rank and "branch" in expected else "cond"
        with (
            torch.no_grad(),
            pytest.raises(RefusedError, match=f"ranks differ in .*{expected}.*; run the same"),
            model.cache_context(branch, **told),
        ):
            model(**inputs)
        assert time.monotonic() - start < 5
        if model.is_cache_enabled:
            model.disable_cache()
    with torch.no_grad():
        assert model(**_inputs(model))[0].isfinite().all()  # a refusal leaves nothing behind


def test_differing_settings_are_refused_on_all_ranks() -> None:
    run_ranks(2, _check_settings)


def _check_drawn_noise(rank: int, scheduler: str, degrees: tuple[int, int, int]) -> None:
    pipe = tiny_pipeline("t2v")
    mesh = SequenceParallelMesh(*degrees)
    with enable_sparse_attention(pipe, CONFIG, mesh):
        for _ in range(2):  # a pipeline may be given another scheduler at any time
            first, pipe.scheduler = pipe.scheduler, SCHEDULERS[scheduler]()
            torch.manual_seed(rank)
            every = _every(run(pipe))
            assert torch.equal(*every)
            assert "step" not in vars(first)
    assert "step" not in vars(pipe.scheduler), "removal must leave no trace"


@pytest.mark.parametrize("degrees", MESHES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_noise_that_a_scheduler_draws_is_the_first_ranks(scheduler: str, degrees: tuple[int, int, int]) -> None:
    run_ranks(2, _check_drawn_noise, scheduler, degrees)


FLAGS = ["--sparse-attn-backend", "reference", "--sparse-attn-schedule", "constant", "--num-inference-steps", "3"]
FLAGS += ["--height", "64", "--width", "64", "--num-frames", "9"]


def _rank_generates(rank: int, flags: list[str], state: int) -> None:
    torch.manual_seed(state + rank)  # whatever the process has drawn before must not matter
    assert generate(flags) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_generate_seeds_what_a_scheduler_draws(tmp_path: Path, scheduler: str) -> None:
    pipe = tiny_pipeline("t2v")
    pipe.scheduler = SCHEDULERS[scheduler]()
    pipe.save_pretrained(tmp_path / "model")
    made: list[Tensor] = []
    for name, more in (("one", []), ("again", []), ("two", ["--ulysses-degree", "2"]), ("other", ["--seed", "1"])):
        latents = tmp_path / f"{name}.pt"
        flags = ["--model", str(tmp_path / "model"), *FLAGS, *more, "--output-latents", str(latents)]
        ranks = 2 if "--ulysses-degree" in more else 1
        run_ranks(ranks, _rank_generates, [*flags, "--output", f"{latents}.mp4"], 10 * len(made))
        made.append(torch.load(latents, weights_only=True))
    assert torch.equal(made[0], made[1])
    assert relative_error(made[2], made[0]) < 1e-4
    assert relative_error(made[3], made[0]) > 0.1


def _parts(pipe: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", *names)}


def _video_to_video(pipe: Any, strength: float, steps: int) -> None:
    from PIL import Image

    frames = [Image.new("RGB", (SIZE["width"], SIZE["height"]), "red")] * SIZE["num_frames"]
    pipe.set_progress_bar_config(disable=True)
    pipe(
        video=frames,
        prompt="a cat",
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=3.0,
        max_sequence_length=16,
        height=SIZE["height"],
        width=SIZE["width"],
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def _dense_steps(recorder: AttentionRecorder) -> list[bool]:
    """Of the second layer, for each step that ran, whether it was dense."""
    rows = {row["step"]: row["dense_calls"] > 0 for row in recorder.summary()["densities"] if row["layer"] == 1}
    assert list(rows) == list(range(len(rows)))
    return list(rows.values())


@pytest.mark.parametrize("target", ["its own pipeline", "a pipeline that shares the scheduler"])
@pytest.mark.parametrize(("strength", "steps", "ran"), [(0.5, 10, 5), (1.0, 4, 4), (0.3, 10, 3)])
def test_video_to_video_counts_the_steps_that_run(target: str, strength: float, steps: int, ran: int) -> None:
    pipe = tiny_pipeline("t2v")
    edits = WanVideoToVideoPipeline(**_parts(pipe, "scheduler", "transformer"))
    recorder = AttentionRecorder()
    owner = edits if target == "its own pipeline" else pipe
    enable_sparse_attention(owner, replace(CONFIG, dense_steps=2), recorder=recorder)
    for _ in range(2):
        recorder.clear()
        _video_to_video(edits, strength, steps)
        assert _dense_steps(recorder) == [True, True, *[False] * (ran - 2)]


def test_a_loop_with_another_scheduler_has_no_known_step() -> None:
    pipe = tiny_pipeline("i2v")
    parts = _parts(pipe, "transformer", "transformer_2")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    second = type(pipe)(**parts, scheduler=scheduler, boundary_ratio=0.9)
    second.set_progress_bar_config(disable=True)
    sharing = type(pipe)(**parts, scheduler=pipe.scheduler, boundary_ratio=0.9)
    sharing.set_progress_bar_config(disable=True)
    recorder = AttentionRecorder()
    with enable_sparse_attention(pipe, replace(CONFIG, schedule="conservative"), recorder=recorder):
        for _ in range(2):  # before its own pipeline has run, and after
            with pytest.raises(ValueError, match=r"needs the denoising step, .*let both pipelines share one scheduler"):
                run(second)
            for one in (pipe, sharing):
                recorder.clear()
                run(one)
                assert _dense_steps(recorder) == [True, False, False, False]
    with enable_sparse_attention(pipe, CONFIG):
        assert run(second).isfinite().all()  # the schedule does not need it


def test_a_loop_that_was_broken_off_does_not_lend_its_step_to_another() -> None:
    own: Any = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (own, other):
        scheduler.set_timesteps(4)
    steps, x = SchedulerSteps(SimpleNamespace(scheduler=own)), torch.zeros(1, 2)
    assert steps(own.timesteps[0].expand(1)) == (0, 4)
    own.step(x, own.timesteps[0], x)
    assert steps(own.timesteps[1].expand(1)) == (1, 4)
    assert steps(other.timesteps[1].expand(1)) == (None, None)


def test_a_loop_that_tells_its_step_may_have_another_scheduler() -> None:
    pipe = tiny_pipeline("t2v")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    second: Any = WanPipeline(**_parts(pipe, "transformer", "transformer_2"), scheduler=scheduler, boundary_ratio=0.9)
    second.set_progress_bar_config(disable=True)
    recorder = AttentionRecorder()
    enable_sparse_attention(pipe, replace(CONFIG, schedule="conservative"), recorder=recorder)
    run(second)
    assert _dense_steps(recorder) == [True, False, False, False]


STEPS = 8
CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.2),
    "sea": lambda: SeaCacheConfig(threshold=0.3),
    "mag": lambda: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.attn1"]
    ),
    "taylor lite": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, use_lite_mode=True),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


# Ulysses, ring, both, and guidance halves.
CACHE_MESHES = [(2, 1, 1), (1, 3, 1), (2, 2, 1), (1, 1, 2)]


@functools.cache
def _cached_on_one_rank(cache: str) -> tuple[Tensor, int]:
    return _cached(cache)


def _cached(cache: str, degrees: tuple[int, int, int] = (1, 1, 1)) -> tuple[Tensor, int]:
    """The final latents with a cache, and how many attention calls there were."""
    pipe, recorder, mesh = tiny_pipeline("t2v"), AttentionRecorder(), SequenceParallelMesh(*degrees)
    late = cache == "pyramid"  # before or after attention is made sparse
    for turn in (False, True):
        if turn == late:
            for model in (pipe.transformer, pipe.transformer_2):
                model.enable_cache(CACHES[cache]())
        else:
            enable_sparse_attention(pipe, CONFIG, mesh, recorder)
    latents = run(pipe, num_inference_steps=STEPS)
    return latents, sum(recorder.summary()["calls"].values())


def _check_cache(rank: int, cache: str, degrees: tuple[int, int, int], expected: Tensor, calls: int) -> None:
    latents, made = _cached(cache, degrees)
    every = _every(latents)
    assert all(torch.equal(every[0], other) for other in every)
    assert relative_error(latents, expected) < 1e-3
    # Each guidance half makes one branch's calls.
    assert sum(_every(torch.tensor(made))) == calls * degrees[0] * degrees[1]


@pytest.mark.parametrize("degrees", CACHE_MESHES)
@pytest.mark.parametrize("cache", CACHES)
def test_step_caches_give_the_one_rank_result(cache: str, degrees: tuple[int, int, int]) -> None:
    expected, calls = _cached_on_one_rank(cache)
    assert 2 * 2 * 2 < calls < 2 * 2 * STEPS, "the cache must skip some steps, and not all"
    if (cache, degrees[2]) != ("pyramid", 2):  # refused
        run_ranks(math.prod(degrees), _check_cache, cache, degrees, expected, calls)


class _OwnCacheConfig:
    pass


def _check_refused_caches(rank: int) -> None:
    model = tiny_transformer()
    enable_sparse_attention(model, CONFIG, SequenceParallelMesh(2))
    for config, text in (
        (_OwnCacheConfig(), "_OwnCacheConfig may decide otherwise on each of the ranks; .*disable_cache"),
        (MagCacheConfig(calibrate=True), "calibrate it on one rank"),
        (FasterCacheConfig(), "FasterCacheConfig wants both guidance branches in one batch.*; use one of FirstBlock"),
        (TextKVCacheConfig(), "TextKVCacheConfig finds no layer of its own in a Wan transformer.*disable_cache"),
    ):
        model._cache_config = config
        with torch.no_grad(), pytest.raises(ValueError, match=text):
            model(**_inputs(model))


def test_caches_that_may_part_the_ranks_are_refused() -> None:
    run_ranks(2, _check_refused_caches)


def _check_pyramid_on_halves(rank: int) -> None:
    with pytest.raises(ValueError, match=r"counts the calls of both guidance branches together.*; use cfg_degree=1"):
        _cached("pyramid", (1, 1, 2))


def test_a_cache_that_mixes_the_branches_is_refused_on_halves() -> None:
    run_ranks(2, _check_pyramid_on_halves)


def test_a_cache_gets_its_own_decision_back() -> None:
    model = tiny_transformer()
    model.enable_cache(FirstBlockCacheConfig())
    (hook,) = model.blocks[0]._diffusers_hook.hooks.values()
    before = set(vars(hook))
    with enable_sparse_attention(model, CONFIG), torch.no_grad(), model.cache_context("cond"):
        model(**_inputs(model))
        assert set(vars(hook)) > before
    assert set(vars(hook)) == before


def _check_interrupted(rank: int, how: str) -> None:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(2, timeout=timedelta(seconds=4)))

    def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and step == 1:
            pipe._interrupt = True
            if how == "keyboard":
                raise KeyboardInterrupt
        return tensors

    start = time.monotonic()
    if rank == 1 and how == "keyboard":
        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=at_step_end)
    elif rank == 1:
        run(pipe, callback_on_step_end=at_step_end)
        if how == "next video":
            with pytest.raises(RefusedError, match=r"ranks differ in step \(rank 0: 2; rank 1: 0\)"):
                run(pipe)
    elif how == "next video":
        with pytest.raises(RefusedError, match=r"ranks differ in step \(rank 0: 2; rank 1: 0\)"):
            run(pipe, callback_on_step_end=at_step_end)
    else:
        sentence = (
            r"^the ranks do not all run step 2 of 4 .*: another rank failed, was interrupted, or runs fewer steps"
        )
        with pytest.raises(LostRankError, match=sentence) as lost:
            run(pipe, callback_on_step_end=at_step_end)
        assert is_lost_rank(lost.value)
        assert "gloo" not in str(lost.value)
    assert time.monotonic() - start < 12
    dist.barrier(world_group())


@pytest.mark.parametrize("how", ["keyboard", "interrupt", "next video"])
def test_a_rank_that_leaves_the_loop_ends_the_others_with_a_sentence(how: str) -> None:
    run_ranks(2, _check_interrupted, how)
