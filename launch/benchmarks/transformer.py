"""`benchmark transformer`: forward passes of a Wan transformer, dense and sparse, on one rank and on meshes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launch.benchmarks.arguments import Mesh, Run, TransformerArguments, every_mesh
from launch.benchmarks.results import Measurement, speedup
from launch.benchmarks.session import Session, free_memory
from launch.benchmarks.timing import Timer
from launch.benchmarks.wan import (
    build_model,
    build_parallel_model,
    dense_backend,
    forward_calls,
    tokens_of,
    why_no_diffusers_parallelism,
)
from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention


def measure_transformer(session: Session, arguments: TransformerArguments) -> None:
    """Dense on meshes, dense on one rank, then sparse on all of them. A collective call.

    What needs one rank runs on all of them at once, each on its own device; the slowest counts.
    """
    _TransformerBenchmark(session, arguments).measure()


class _TransformerBenchmark:
    """The measurements, and the dense ones among them by (mesh, video, compiled)."""

    def __init__(self, session: Session, arguments: TransformerArguments) -> None:
        self._session, self._arguments = session, arguments
        self._timer = Timer(session.ranks, arguments.warmup, arguments.repeat)
        self._dense: dict[tuple[Mesh, str, bool], Measurement] = {}
        self._modes = [mode == "compiled" for mode in ("eager", "compiled") if mode in arguments.modes]

    def measure(self) -> None:
        device, world = self._session.ranks.device, self._session.ranks.world
        for degrees in every_mesh(world) if world > 1 else ():
            self._measure_diffusers(degrees)
            _forget_compiled()  # it may refer to the model
            free_memory()
        model = build_model(self._arguments, device)
        meshes = self._arguments.build_meshes(world)
        for compiled in self._modes:
            self._prepare(model, compiled)
            for video in self._arguments.videos:
                self._measure_dense(model, (1, 1), video, compiled)
                for mesh in meshes:
                    self._measure_sparse(model, mesh, video, compiled)

    def _measure_diffusers(self, mesh: Mesh) -> None:
        """Dense under diffusers' own parallelism, in a model of its own, for it cannot be undone."""
        label, device = "diffusers {}x{}".format(*mesh), self._session.ranks.device
        reason = why_no_diffusers_parallelism(device)
        if reason is not None:
            self._session.ranks.say(f"{label} is not measured: {reason}")
            return
        if not self._session.in_time(label):
            return
        model = self._session.attempt(label, lambda: build_parallel_model(self._arguments, device, *mesh))
        if model is None:
            return
        for compiled in self._modes:
            self._prepare(model, compiled)
            for video in self._arguments.videos:
                self._measure_dense(model, mesh, video, compiled)

    def _prepare(self, model: Any, compiled: bool) -> None:
        if compiled:
            model.compile_repeated_blocks(backend=self._arguments.compile_backend)

    def _measure_dense(self, model: Any, mesh: Mesh, video: str, compiled: bool) -> None:
        label = _label("diffusers", mesh, video, compiled, 1.0)
        name = dense_backend(self._session.ranks.device)
        _forget_compiled()
        measured = self._session.measure(
            label, lambda: self._measurement(model, "diffusers", mesh, video, compiled, 1.0, name)
        )
        if measured is not None:
            self._dense[mesh, video, compiled] = measured

    def _measure_sparse(self, model: Any, on: SequenceParallelMesh, video: str, compiled: bool) -> None:
        mesh = on.ulysses_degree, on.ring_degree
        _forget_compiled()
        for run in self._arguments.runs():
            label = _label(f"sp_sparse {run}", mesh, video, compiled, run.density)
            self._session.measure(label, self._sparse(model, on, video, compiled, run))

    def _sparse(
        self, model: Any, on: SequenceParallelMesh, video: str, compiled: bool, run: Run
    ) -> Callable[[], Measurement]:
        config = SparseAttentionConfig(
            backend=run.backend,
            topk=run.density,
            schedule="constant",
            remainder=run.remainder,
            token_order=self._arguments.token_order,
            block_size=self._arguments.block_size,
        )
        device, dtype = self._session.ranks.device, getattr(torch, self._arguments.dtype)

        def take() -> Measurement:
            with enable_sparse_attention(model, config, on) as handle:
                kernel = "dense" if run.density >= 1.0 else handle.layers[0].kernel_for(device, dtype).info.name
                mesh = on.ulysses_degree, on.ring_degree
                if run.remainder != "drop":
                    kernel = f"{kernel}+{run.remainder}"
                return self._measurement(model, "sp_sparse", mesh, video, compiled, run.density, kernel)

        return take

    def _measurement(
        self, model: Any, implementation: str, mesh: Mesh, video: str, compiled: bool, density: float, kernel: str
    ) -> Measurement:
        arguments, gpus = self._arguments, mesh[0] * mesh[1]
        latents = arguments.videos[video]
        times = self._timer(forward_calls(model, arguments, latents, self._session.ranks.device))
        own = implementation == "diffusers"
        baseline = None if own else self._best_dense(gpus, video, compiled)
        extra = {
            "implementation": implementation,
            "video": video,
            "compiled": compiled,
            "layers": arguments.layers,
            "ms_per_layer": round(times.median / arguments.layers, 4),
            "block_size": None if own else "{}x{}".format(*arguments.block_size),
            "peak_memory_ratio": None if own else self._memory_ratio(times.peak_memory, mesh, video, compiled),
        }
        return Measurement(
            "transformer", gpus, *mesh, tokens_of(latents), arguments.heads, arguments.head_dim, density, kernel, times,
            None, None if baseline is None else f"diffusers {baseline.ulysses}x{baseline.ring}",
            speedup(baseline, times), extra,
        )  # fmt: skip

    def _best_dense(self, gpus: int, video: str, compiled: bool) -> Measurement | None:
        """The fastest dense way on as many GPUs: on one, diffusers' own attention; on several, any mesh."""
        able = [
            measured
            for (mesh, of_video, mode), measured in self._dense.items()
            if mesh[0] * mesh[1] == gpus and of_video == video and mode == compiled
        ]
        return min(able, key=lambda measured: measured.times.median, default=None)

    def _memory_ratio(self, peak: int | None, mesh: Mesh, video: str, compiled: bool) -> float | None:
        dense = self._dense.get((mesh, video, compiled))
        if peak is None or dense is None or dense.times.peak_memory is None:
            return None
        return round(peak / dense.times.peak_memory, 3)


def _forget_compiled() -> None:
    """Compile anew for every video and mesh: what has seen two lengths compiles for any, and that is slower."""
    torch.compiler.reset()


def _label(by: str, mesh: Mesh, video: str, compiled: bool, density: float) -> str:
    mode = "compiled" if compiled else "eager"
    return f"{by} {mesh[0]}x{mesh[1]} {video} {mode}, density {density:g}"
