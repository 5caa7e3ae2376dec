"""benchmark_vllm_omni.py: on one rank and on meshes, vllm-omni's Wan transformer dense and by SP_SPARSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launch.benchmarks.arguments import Mesh
from launch.benchmarks.omni_arguments import OmniArguments, parse_omni_arguments
from launch.benchmarks.omni_check import LayerCall, capture_call, relative_error, repeat_call
from launch.benchmarks.omni_model import OmniJob, OmniTransformer, omni_transformer
from launch.benchmarks.results import Measurement, speedup
from launch.benchmarks.session import Session, free_memory
from launch.benchmarks.timing import Timer
from launch.benchmarks.wan import tokens_of
from sp_sparse.generate.console import tell
from sp_sparse.generate.ranks import USER_ERRORS, Ranks, start_ranks
from sp_sparse.parallel.agreement import RefusedError


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure.

    Returns:
        0; 1 if a check or a measurement failed; 2 for an error of the user's.
    """
    arguments = parse_omni_arguments(argv)
    try:
        with start_ranks(arguments.device, arguments.timeout_s) as ranks, torch.no_grad():
            _start_group_of_one(ranks)
            ranks.check_same(arguments)
            benchmark = ranks.together(lambda: _OmniBenchmark(arguments, ranks))
            return benchmark.run()
    except RefusedError as refused:
        if refused.speaks:
            tell(str(refused))
    except USER_ERRORS as error:
        tell(str(error))
    return 2


class _OmniBenchmark:
    """The measurements; what one rank gave is kept for the meshes to be checked against."""

    def __init__(self, arguments: OmniArguments, ranks: Ranks) -> None:
        self._arguments, self._ranks = arguments, ranks
        self._meshes = arguments.all_meshes(ranks.world)
        self._session = Session(ranks, arguments.output, arguments.time_limit_s)
        self._timer = Timer(ranks, arguments.warmup, arguments.repeat)
        self._single: dict[tuple[str, float], tuple[LayerCall, Tensor]] = {}
        self._single_dense: dict[str, Tensor] = {}
        self._dense: dict[tuple[Mesh, str], Measurement] = {}
        self._failed = False

    def run(self) -> int:
        for mesh in self._meshes:
            for name in self._arguments.dense:
                if mesh[1] == 1 or name == "auto":  # vllm-omni refuses most names for a ring
                    self._with_model(mesh, {} if name == "auto" else {"default": {"backend": name}}, None)
            for sparsity in self._arguments.sparsities:
                spec = {"backend": "SP_SPARSE", "block_sparse": {"sparsity": sparsity}}
                self._with_model(mesh, {"per_role": {"self": spec}}, sparsity)
        status = self._session.finish()
        return 1 if self._failed else status

    def _with_model(self, mesh: Mesh, attention: dict[str, Any], sparsity: float | None) -> None:
        """Build the model, check it where it is sparse, and time it."""
        label = f"{mesh[0]}x{mesh[1]} " + (f"dense {attention}" if sparsity is None else f"sparsity {sparsity:g}")
        if not self._session.in_time(label):
            return

        def action() -> None:
            with omni_transformer(self._job(mesh, attention)) as transformer:
                self._tell_backends(label, transformer)
                checked = {
                    video: self._compare_dense(transformer, mesh, video, latents)
                    if sparsity is None
                    else self._check(transformer, mesh, video, latents, sparsity)
                    for video, latents in self._arguments.videos.items()
                }
                if self._arguments.compile:
                    from vllm_omni.diffusion.compile import regionally_compile

                    regionally_compile(transformer.model, dynamic=True)
                for video, extra in checked.items():
                    self._measure(transformer, mesh, video, sparsity, extra)

        self._session.attempt(label, action)
        torch.compiler.reset()
        free_memory()

    def _compare_dense(
        self, transformer: OmniTransformer, mesh: Mesh, video: str, latents: tuple[int, int, int]
    ) -> dict[str, Any]:
        """How far vllm-omni's own dense attention on a mesh is from itself on one rank: what rounding makes of a model."""
        output = transformer(*self._inputs(latents)[0], step=0)
        if mesh == (1, 1):
            self._single_dense.setdefault(video, output)
            return {}
        if video not in self._single_dense:
            return {}
        error = max(self._ranks.gather(relative_error(output, self._single_dense[video])))
        self._ranks.say(f"{mesh[0]}x{mesh[1]} {video}, vllm-omni's dense against one rank: of the model {error:.2e}")
        return {"model_error": error}

    def _check(
        self, transformer: OmniTransformer, mesh: Mesh, video: str, latents: tuple[int, int, int], sparsity: float
    ) -> dict[str, Any]:
        """Keep what one rank gives; compare a mesh with it."""
        inputs = self._inputs(latents)[0]
        if mesh == (1, 1):
            self._single[video, sparsity] = capture_call(transformer, *inputs)
            self._refuse_dense(transformer)
            return {}
        if (video, sparsity) not in self._single:
            raise RuntimeError(
                f"{video} at sparsity {sparsity:g} was not run on one rank, so there is nothing to check against"
            )
        call, expected = self._single[video, sparsity]
        frames, height, width = latents
        same, layer_error = repeat_call(transformer, call, (frames, height // 2, width // 2), mesh, self._ranks.rank)
        model_error = relative_error(transformer(*inputs, step=0), expected)
        self._refuse_dense(transformer)
        every = self._ranks.gather((same, layer_error, model_error))
        masks, layer, model = all(x[0] for x in every), max(x[1] for x in every), max(x[2] for x in every)
        passed = masks and layer <= self._arguments.tolerance and model <= self._arguments.model_tolerance
        self._failed |= not passed
        self._ranks.say(
            f"{'ok' if passed else 'FAILED'}: {mesh[0]}x{mesh[1]} {video}, sparsity {sparsity:g}, against one rank: masks "
            f"{'identical' if masks else 'DIFFER'}; relative error of a layer {layer:.2e}, of the model {model:.2e}"
        )
        return {"masks_identical": masks, "layer_error": layer, "model_error": model}

    def _refuse_dense(self, transformer: OmniTransformer) -> None:
        if any(layer.sparse_calls == 0 or layer.dense_calls for layer in transformer.sparse_layers()):
            raise RuntimeError("a self-attention layer did not run sparse")

    def _measure(
        self, transformer: OmniTransformer, mesh: Mesh, video: str, sparsity: float | None, extra: dict[str, Any]
    ) -> None:
        arguments, latents = self._arguments, self._arguments.videos[video]
        inputs = self._inputs(latents)
        by, density = ("vllm-omni", 1.0) if sparsity is None else ("SP_SPARSE", round(1.0 - sparsity, 4))
        baseline = None if sparsity is None else self._dense.get((mesh, video))

        def take() -> Measurement:
            times = self._timer(lambda number: transformer(*inputs[number % len(inputs)], step=number))
            told = {
                "implementation": by,
                "video": video,
                "compiled": arguments.compile,
                "layers": arguments.layers,
                "ms_per_layer": round(times.median / arguments.layers, 4),
                "block_size": None if sparsity is None else "{}x{}".format(*arguments.block_size),
                **extra,
            }
            return Measurement(
                "vllm-omni", mesh[0] * mesh[1], *mesh, tokens_of(latents), arguments.heads, arguments.head_dim, density,
                self._kernel(transformer), times, None, None if baseline is None else f"vllm-omni {baseline.kernel}",
                speedup(baseline, times), told,
            )  # fmt: skip

        measured = self._session.measure(f"{by} {mesh[0]}x{mesh[1]} {video}, density {density:g}", take)
        if measured is not None and sparsity is None:
            best = self._dense.get((mesh, video), measured)
            self._dense[mesh, video] = min(measured, best, key=lambda one: one.times.median)

    def _kernel(self, transformer: OmniTransformer) -> str:
        layers = transformer.sparse_layers()
        if not layers:
            return transformer.model.blocks[0].attn1.attn.attn_backend.get_name()
        return layers[0].kernel(self._ranks.device, getattr(torch, self._arguments.dtype))

    def _job(self, mesh: Mesh, attention: dict[str, Any]) -> OmniJob:
        arguments = self._arguments
        shape = {
            "num_attention_heads": arguments.heads,
            "attention_head_dim": arguments.head_dim,
            "ffn_dim": arguments.ffn_dim,
            "text_dim": arguments.text_dim,
            "num_layers": arguments.layers,
        }
        options = {"backend": arguments.backend, "block_size": arguments.block_size}
        device, dtype = self._ranks.device, getattr(torch, arguments.dtype)
        return OmniJob(shape, *mesh, attention=attention, options=options, device=device, dtype=dtype)

    def _inputs(self, latents: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """Two random inputs, the same on every rank."""
        arguments, device = self._arguments, self._ranks.device
        dtype = getattr(torch, arguments.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        return [(noise(1, 16, *latents), noise(1, arguments.text_tokens, arguments.text_dim)) for _ in range(2)]

    def _tell_backends(self, label: str, transformer: OmniTransformer) -> None:
        block = transformer.model.blocks[0]
        names = (block.attn1.attn.attn_backend.get_name(), block.attn2.attn.attn_backend.get_name())
        self._ranks.say(f"{label}: self-attention {names[0]}, cross-attention {names[1]}")


def _start_group_of_one(ranks: Ranks) -> None:
    """vllm-omni wants a process group even for one rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
