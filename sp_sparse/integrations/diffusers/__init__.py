"""Sparse, sequence-parallel Wan 2.2 in diffusers: one call turns a pipeline or a transformer, another turns it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sp_sparse.attention import SparseAttention
from sp_sparse.config import SparseAttentionConfig
from sp_sparse.integrations.diffusers.call import StepSource, WanCall
from sp_sparse.integrations.diffusers.cfg import BranchParallel, GuidanceHalves
from sp_sparse.integrations.diffusers.processor import SparseWanProcessor
from sp_sparse.integrations.diffusers.shadows import Shadows
from sp_sparse.parallel.agreement import together
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
    A collective call on meshes of several ranks.

    Args:
        target: a `WanPipeline`, `WanImageToVideoPipeline` or other pipeline with a `transformer` and perhaps a
            `transformer_2`, each a `WanTransformer3DModel`; or one such transformer.
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
    halves = GuidanceHalves(mesh, target) if mesh.cfg_degree > 1 else None
    step_source = _scheduler_step(target) if hasattr(target, "scheduler") else _no_step(config)
    layers = {
        expert: [
            SparseAttention(
                config,
                mesh,
                num_heads=model.config.num_attention_heads,
                head_dim=model.config.attention_head_dim,
                layer=layer,
                expert=expert,
                recorder=recorder,
            )
            for layer in range(len(model.blocks))
        ]
        for expert, model in models.items()
    }

    def place() -> None:
        for expert, model in models.items():
            _attach(model, layers[expert], mesh, config, step_source, halves, handle._undo)
            handle.layers += layers[expert]

    # Everything that can be refused has been: from here on only hooks are placed, on all ranks or on none.
    try:
        together(place, mesh.groups) if mesh.groups else place()
    except BaseException:
        handle.remove()
        raise
    return handle


def _transformers(target: Any) -> dict[int, Any]:
    """Expert number -> transformer."""
    from diffusers import WanTransformer3DModel

    _check_not_compiled(target)
    if isinstance(target, WanTransformer3DModel):
        return {0: target}
    found = {i: getattr(target, name, None) for i, name in enumerate(("transformer", "transformer_2"))}
    models = {i: model for i, model in found.items() if model is not None}
    for model in models.values():
        _check_not_compiled(model)
    if not models or not all(isinstance(model, WanTransformer3DModel) for model in models.values()):
        has = " and ".join(type(model).__name__ for model in models.values())
        raise TypeError(
            f"{type(target).__name__}{' has ' + has + ', which' if has else ''} is not taken: sparse attention is for "
            "WanTransformer3DModel and the pipelines made of it, such as WanPipeline and WanImageToVideoPipeline; pass one "
            "of these, or leave this one as it is (backend 'none')"
        )
    return models


def _shape(model: Any) -> tuple[int, int, int]:
    return len(model.blocks), model.config.num_attention_heads, model.config.attention_head_dim


def _check_not_compiled(model: Any) -> None:
    """Compiled as a whole, a model calls what was traced, past the hooks; compiled blocks are traced anew."""
    whole = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if whole or hasattr(getattr(model, "forward", None), "_torchdynamo_orig_callable"):
        raise RuntimeError(
            f"{type(model).__name__} is compiled as a whole; enable sparse attention on the transformer as it was loaded, "
            "and compile afterwards, with its compile_repeated_blocks()"
        )


def _check_untouched(model: Any) -> None:
    if any(isinstance(block.attn1.processor, SparseWanProcessor) for block in model.blocks):
        raise RuntimeError("this transformer is sparse already; call remove() on what enable_sparse_attention returned")
    if getattr(model, "_parallel_config", None) is not None:
        raise RuntimeError(
            "diffusers' enable_parallelism is on for this transformer, and both would shard its tokens; load it without "
            "parallel_config, and give the degrees to SequenceParallelMesh instead"
        )


def _scheduler_step(pipeline: Any) -> StepSource:
    """The step as the scheduler counts it, on the host, for loops that do not pass it (image-to-video)."""

    def source() -> tuple[int | None, int | None]:
        scheduler = pipeline.scheduler
        if not hasattr(scheduler, "step_index") or scheduler.timesteps is None:
            return None, None
        return scheduler.step_index or 0, len(scheduler.timesteps)

    return source


def _no_step(config: SparseAttentionConfig) -> StepSource:
    """For a transformer without its pipeline, whose loop may not pass the step."""

    def source() -> tuple[int | None, int | None]:
        if config.schedule_for(0).needs_step:
            raise ValueError(
                f"schedule {config.schedule!r} with dense_steps={config.dense_steps} needs the denoising step, which the "
                "caller of this transformer does not tell (image-to-video pipelines do not); pass the pipeline to "
                "enable_sparse_attention instead of its transformer, or use schedule='constant' and dense_steps=0"
            )
        return None, None

    return source


class _LoopPosition:
    """Where the denoising loop is, as it tells `cache_context`."""

    def __init__(self, fallback: StepSource) -> None:
        self.branch: str | None = None
        self._told: tuple[int | None, int | None] = (None, None)
        self._fallback = fallback

    def steps(self) -> tuple[int | None, int | None]:
        return self._fallback() if None in self._told else self._told

    def listening(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def listening_context(name: str, **kwargs: Any) -> Iterator[None]:
            self.branch, self._told = name, (kwargs.get("step_index"), kwargs.get("num_inference_steps"))
            try:
                with cache_context(name, **kwargs):
                    yield
            finally:
                self.branch, self._told = None, (None, None)

        return listening_context


def _attach(
    model: Any,
    layers: list[SparseAttention],
    mesh: SequenceParallelMesh,
    config: SparseAttentionConfig,
    step_source: StepSource,
    halves: GuidanceHalves | None,
    undo: ExitStack,
) -> None:
    call = WanCall(mesh, config.token_order, layers[0].shards)
    position = _LoopPosition(step_source)
    patch = model.config.patch_size

    @torch.compiler.disable
    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(block.attn1.processor.__class__ is not SparseWanProcessor for block in model.blocks):
            raise RuntimeError(
                "a self-attention processor was replaced after enable_sparse_attention, so that block would attend only "
                "this rank's tokens; call remove() first"
            )
        latents = args[0] if args else kwargs["hidden_states"]
        frames, height, width = (n // p for n, p in zip(latents.shape[2:], patch, strict=True))
        call.begin(VideoGrid(frames, height, width), *position.steps(), latents.device)
        args, kwargs = _replace_argument(args, kwargs, 1, "timestep", _enter_timestep(call))
        return args, kwargs

    for block, layer in zip(model.blocks, layers, strict=True):
        processor = SparseWanProcessor(layer, call, block.attn1.processor)
        undo.callback(processor.remove_from, block.attn1)
        block.attn1.set_processor(processor)
    hooks: tuple[Callable[[], Any], ...] = (
        lambda: model.register_forward_pre_hook(before_forward, with_kwargs=True),
        lambda: model.rope.register_forward_hook(lambda m, a, tables: tuple(call.enter(table, 1) for table in tables)),
        # [B, C, T, H, W] -> [B, C, S_rank, 1, 1], which the model flattens to this rank's tokens.
        lambda: model.patch_embedding.register_forward_hook(
            lambda m, a, x: call.enter(x.flatten(2), 2)[..., None, None]
        ),
        lambda: model.proj_out.register_forward_hook(lambda m, a, x: call.leave(x)),
    )
    for hook in hooks:
        undo.callback(hook().remove)
    shadows = Shadows(model)
    undo.callback(shadows.remove)
    shadows.place("enable_parallelism", lambda _: _refuse_enable_parallelism)
    if halves is None:
        shadows.place("cache_context", position.listening)
        return

    def place_branches() -> None:
        shadows.place(
            "forward",
            lambda forward: BranchParallel(forward, halves, model.config.out_channels, lambda: position.branch),
        )

    place_branches()
    shadows.place(
        "cache_context",
        lambda own: position.listening(halves.watching(own, place_branches)),
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
