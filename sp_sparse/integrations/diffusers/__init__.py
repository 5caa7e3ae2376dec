"""Sparse, sequence-parallel Wan in diffusers: one call turns a pipeline or a transformer, another turns it back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sp_sparse.attention import SparseAttention
from sp_sparse.config import SECOND_EXPERT, SparseAttentionConfig
from sp_sparse.integrations.diffusers.agree import ForwardAgreement, SchedulerAgreement
from sp_sparse.integrations.diffusers.branches import BranchesByOrder, tells_no_branch
from sp_sparse.integrations.diffusers.caches import CacheAgreement
from sp_sparse.integrations.diffusers.call import WanCall
from sp_sparse.integrations.diffusers.cfg import BranchParallel, GuidanceHalves
from sp_sparse.integrations.diffusers.face import FrameAlignedProcessor
from sp_sparse.integrations.diffusers.family import (
    ANIMATE,
    VACE,
    WAN,
    attending_blocks,
    entrances,
    input_names,
    kind_of,
)
from sp_sparse.integrations.diffusers.forward_end import ForwardEnd
from sp_sparse.integrations.diffusers.position import LoopPosition, SchedulerSteps, StepSource, no_steps
from sp_sparse.integrations.diffusers.processor import SparseWanProcessor
from sp_sparse.integrations.diffusers.shadows import Shadows
from sp_sparse.parallel.agreement import together
from sp_sparse.parallel.failures import Standing
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.recorder import AttentionRecorder
from sp_sparse.video import VideoGrid

__all__ = ["SparseWan", "enable_sparse_attention"]


class SparseWan:
    """What `enable_sparse_attention` did; `remove` (or leaving it as a context manager) undoes it exactly."""

    def __init__(self) -> None:
        self.layers: list[SparseAttention] = []
        self._undo = ExitStack()

    def remove(self) -> None:
        """Give the model its own attention, forward and methods back. Calling it again does nothing.

        What another library has placed since, such as accelerate's hooks or another attention processor, stays.
        """
        self._undo.close()

    def __enter__(self) -> SparseWan:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def enable_sparse_attention(
    target: Any,
    config: SparseAttentionConfig,
    mesh: SequenceParallelMesh | None = None,
    recorder: AttentionRecorder | None = None,
) -> SparseWan:
    """Make the self-attention of a Wan pipeline or transformer sparse, its sequence sharded over the ranks of `mesh`.

    Tokens are put in order and cut once, where they enter the blocks (hidden states, rotary tables and per-token timesteps
    alike), and put back where they leave. Cross-attention stays as it is. With backend `none` nothing at all is touched.
    The control path of VACE is sparse, too; each of its blocks is scheduled as the layer whose hint it makes. A collective
    call on meshes of several ranks.

    Args:
        target: a `WanPipeline`, `WanImageToVideoPipeline`, `WanVideoToVideoPipeline`, `WanVACEPipeline`,
            `WanAnimatePipeline` or other pipeline with a `transformer` and perhaps a `transformer_2`, each a
            `WanTransformer3DModel`, `WanVACETransformer3DModel` or `WanAnimateTransformer3DModel`; or one such transformer.
        config: what is sparse, and how.
        mesh: the process groups; by default this rank alone.
        recorder: collects what really ran.

    Raises:
        TypeError: a target without a Wan transformer, or with `cfg_degree=2` one that is no pipeline.
        ValueError: a configuration that the model or the mesh cannot serve.
        RuntimeError: the model is sparse or compiled already, or diffusers' own parallelism is on; or ranks differ.
    """
    mesh = mesh or SequenceParallelMesh()
    models = _transformers(target)
    mesh.check_same("the model and sparse attention settings", (config, [_shape(model) for model in models.values()]))
    handle = SparseWan()
    if config.backend == "none":
        return handle
    for model in models.values():
        _check_untouched(model)
    _check_read(config, models)
    standing = Standing()
    halves = GuidanceHalves(mesh, target, standing) if mesh.cfg_degree > 1 else None
    scheduler = SchedulerAgreement(target, mesh.groups, standing) if hasattr(target, "scheduler") else None
    step_source = SchedulerSteps(target) if hasattr(target, "scheduler") else no_steps
    layers: dict[int, list[SparseAttention]] = {}
    like: SparseAttention | None = None
    for expert, model in models.items():
        head_dim = model.config.attention_head_dim
        like = like if like is not None and like.head_dim == head_dim else None
        layers[expert] = []
        for attending in attending_blocks(model):
            made = SparseAttention(
                config,
                mesh,
                num_heads=model.config.num_attention_heads,
                head_dim=head_dim,
                layer=attending.layer,
                expert=expert,
                recorder=recorder,
                like=like,
                check_calls=False,  # compared once a forward
            )
            layers[expert].append(made)
            like = like or made

    def place() -> None:
        for expert, model in models.items():
            if tells_no_branch(target):
                for hook in BranchesByOrder(target, model).hooks():
                    handle._undo.callback(hook().remove)
            _attach(model, layers[expert], mesh, config, step_source, scheduler, halves, standing, handle._undo)
            handle.layers += layers[expert]
        if scheduler is not None:
            handle._undo.callback(scheduler.release)

    # Everything that can be refused has been: from here on only hooks are placed, on all ranks or on none.
    try:
        together(place, mesh.groups) if mesh.groups else place()
    except BaseException:
        handle.remove()
        raise
    return handle


def _transformers(target: Any) -> dict[int, Any]:
    """Expert number -> transformer."""
    _check_not_compiled(target)
    if kind_of(target) is not None:
        return {0: target}
    found = {i: getattr(target, name, None) for i, name in enumerate(("transformer", "transformer_2"))}
    models = {i: model for i, model in found.items() if model is not None}
    for model in models.values():
        _check_not_compiled(model)
    if not models or not all(kind_of(model) for model in models.values()):
        has = " and ".join(type(model).__name__ for model in models.values())
        raise TypeError(
            f"{type(target).__name__}{' has ' + has + ', which' if has else ''} is not taken: sparse attention is for "
            f"{WAN}, {VACE}, {ANIMATE} and the pipelines made of them, such as WanPipeline and WanImageToVideoPipeline; "
            "pass one of these, or leave this one as it is (backend 'none')"
        )
    return models


def _check_read(config: SparseAttentionConfig, models: dict[int, Any]) -> None:
    """Refuse settings for an expert or layers that are not there: nothing would read them."""
    given = [name for name in SECOND_EXPERT if getattr(config, name) not in (None, ())]
    if given and 1 not in models:
        raise ValueError(
            f"{', '.join(given)} is for a second expert, and there is one transformer; give the pipeline with both, or "
            f"leave {given[0]} out"
        )
    for expert, model in models.items():
        rows, layers = len(config.schedule_for(expert).table), len(model.blocks)
        if rows > layers:
            raise ValueError(
                f"the schedule table has {rows} rows, and the model {layers} layers; give {layers} at most"
            )


def _shape(model: Any) -> tuple[object, ...]:
    layers = tuple(attending.layer for attending in attending_blocks(model))
    return kind_of(model), layers, model.config.num_attention_heads, model.config.attention_head_dim


def _check_not_compiled(model: Any) -> None:
    """Compiled as a whole, a model calls what was traced, past the hooks; compiled blocks are traced anew."""
    whole = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if whole or hasattr(getattr(model, "forward", None), "_torchdynamo_orig_callable"):
        raise RuntimeError(
            f"{type(model).__name__} is compiled as a whole; enable sparse attention on the transformer as it was loaded, "
            "and compile afterwards, with its compile_repeated_blocks()"
        )


def _check_untouched(model: Any) -> None:
    if any(isinstance(found.block.attn1.processor, SparseWanProcessor) for found in attending_blocks(model)):
        raise RuntimeError("this transformer is sparse already; call remove() on what enable_sparse_attention returned")
    if getattr(model, "_parallel_config", None) is not None:
        raise RuntimeError(
            "diffusers' enable_parallelism is on for this transformer, and both would shard its tokens; load it without "
            "parallel_config, and give the degrees to SequenceParallelMesh instead"
        )


def _attach(
    model: Any,
    layers: list[SparseAttention],
    mesh: SequenceParallelMesh,
    config: SparseAttentionConfig,
    step_source: StepSource,
    scheduler: SchedulerAgreement | None,
    halves: GuidanceHalves | None,
    standing: Standing,
    undo: ExitStack,
) -> None:
    call = WanCall(mesh, config.token_order, layers[0].shards, standing)
    position = LoopPosition(step_source)
    agree = ForwardAgreement(mesh, input_names(model), keeps_latents=scheduler is None)
    cache = CacheAgreement(model, mesh, undo)
    needs_step = config.schedule_for(layers[0].expert).needs_step
    patch = model.config.patch_size
    attentions = [found.block.attn1 for found in attending_blocks(model)]
    placed: list[tuple[Any, type[Any]]] = [(attn, SparseWanProcessor) for attn in attentions]
    placed += [(adapter, FrameAlignedProcessor) for adapter in getattr(model, "face_adapter", ())]
    end = ForwardEnd(model, layers, attentions, call, mesh, standing, agree.confirm)

    @torch.compiler.disable
    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        standing.check()
        latents, timestep = (
            args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("hidden_states", "timestep"))
        )
        grid = VideoGrid(*(n // p for n, p in zip(latents.shape[2:], patch, strict=True)))
        step, num_steps = position.steps(timestep)
        replaced = any(attn.processor.__class__ is not ours for attn, ours in placed)
        settings = {"step": step, "number of steps": num_steps, "grid": grid.shape, "step cache": cache.told()}
        call.begin(step, num_steps)
        with call.says_lost_rank():
            # The cut of the tokens follows from the grid, and from what was compared when attention was made sparse.
            args, kwargs = agree({**settings, "replaced processors": replaced}, position.branch, args, kwargs)
        if replaced:
            raise RuntimeError(
                "an attention processor was replaced after enable_sparse_attention, so that block would attend only this "
                "rank's tokens, or the wrong ones; call remove() first"
            )
        if step is None and needs_step:
            raise ValueError(
                f"schedule {config.schedule!r} with dense_steps={config.dense_steps} needs the denoising step, which is not "
                "known here: the loop does not tell cache_context, and its timestep is not where the scheduler of the "
                "pipeline given to enable_sparse_attention stands; give enable_sparse_attention the pipeline that runs, "
                "let both pipelines share one scheduler, tell cache_context(step_index=, num_inference_steps=) in a loop of "
                "your own, or use schedule='constant' without dense_steps"
            )
        cache.prepare()
        if scheduler is not None:
            scheduler.watch()
        call.plan_for(grid, latents)
        return _replace_argument(args, kwargs, 1, "timestep", _enter_timestep(call))

    @torch.compiler.disable
    def after_forward(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if out is None:  # called by torch while it handles what the forward raised, and raises it then
            error = sys.exc_info()[1]
            if isinstance(error, Exception):
                end(error)
            return
        raised = end(None)
        if raised is not None:
            raise raised

    for attn, layer in zip(attentions, layers, strict=True):
        processor = SparseWanProcessor(layer, call, attn.processor)
        undo.callback(processor.remove_from, attn)
        attn.set_processor(processor)
    hooks: tuple[Callable[[], Any], ...] = (
        lambda: model.register_forward_pre_hook(before_forward, with_kwargs=True),
        *entrances(model, call),
        lambda: model.proj_out.register_forward_hook(lambda m, a, x: call.leave(x)),
    )
    for hook in hooks:
        undo.callback(hook().remove)
    shadows = Shadows(model)
    undo.callback(shadows.remove)
    shadows.place("enable_parallelism", lambda _: _refuse_enable_parallelism)
    if halves is None:
        undo.callback(model.register_forward_hook(after_forward, always_call=True).remove)
        shadows.place("cache_context", position.listening)
        return

    channels = model.proj_out.out_features // math.prod(patch)

    def place_branches() -> None:
        shadows.place(
            "forward",
            lambda forward: BranchParallel(forward, halves, channels, lambda: position.branch, end),
        )

    place_branches()
    shadows.place(
        "cache_context",
        lambda own: position.listening(halves.watching(own, place_branches, end.skip)),
    )


def _enter_timestep(call: WanCall) -> Callable[[Tensor], Tensor]:
    # TI2V gives every token its own timestep, [B, S]; the other models give one a video, [B].
    return lambda timestep: call.enter(timestep, 1) if timestep.ndim == 2 else timestep


def _replace_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > place:
        return (*args[:place], change(args[place]), *args[place + 1 :]), kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def _refuse_enable_parallelism(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "this transformer's tokens are sharded by sp_sparse already; choose the degrees with SequenceParallelMesh, or call "
        "remove() on what enable_sparse_attention returned and then enable_parallelism"
    )
