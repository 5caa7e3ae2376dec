"""`benchmark attention`: the layer on one rank and on meshes, against dense attention, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.benchmarks.arguments import AttentionArguments, Run
from launch.benchmarks.breakdown import measure_breakdown
from launch.benchmarks.inputs import Inputs, make_layer, shard_inputs
from launch.benchmarks.results import Measurement, speedup
from launch.benchmarks.session import Session, free_memory
from launch.benchmarks.timing import Timer
from sp_sparse import AttentionRecorder, SequenceParallelMesh, VideoGrid

# (query, key, value), each `[B, S, H, D]` -> anything
Dense = Callable[[Tensor, Tensor, Tensor], object]


def measure_attention(session: Session, arguments: AttentionArguments) -> None:
    """Every grid: dense attention on one rank, then every mesh, backend and density. A collective call.

    What needs one rank runs on all of them at once, each on its own device; the slowest counts.
    """
    meshes = arguments.build_meshes(session.ranks.world)
    for grid in arguments.grids:
        _GridBenchmark(session, arguments, grid).measure(meshes)


class _GridBenchmark:
    """The measurements of one grid, and those among them that others are compared with."""

    def __init__(self, session: Session, arguments: AttentionArguments, grid: VideoGrid) -> None:
        self._session, self._arguments, self._grid = session, arguments, grid
        self._timer = Timer(session.ranks, arguments.warmup, arguments.repeat)
        self._one_rank_dense: Measurement | None = None
        # On one rank.
        self._one_rank: dict[Run, Measurement] = {}

    def measure(self, meshes: list[SequenceParallelMesh]) -> None:
        arguments, ranks = self._arguments, self._session.ranks
        for mesh in meshes:
            free_memory()
            inputs = [shard_inputs(arguments, mesh, self._grid, ranks, n) for n in range(arguments.input_sets)]
            if mesh.sequence_degree == 1:
                self._measure_baselines(inputs)
            dense = self._measure_layer(mesh, inputs, Run("auto", 1.0), self._one_rank_dense)
            # One rank has a stronger baseline than the layer's own dense attention.
            baseline = self._one_rank_dense if mesh.sequence_degree == 1 else dense
            exchanges = arguments.kv_exchanges if mesh.ring_degree > 1 else ("ring",)
            for run in arguments.runs():
                for exchange in exchanges if run.density < 1.0 else ():
                    self._measure_layer(mesh, inputs, run, baseline, exchange)

    def _measure_baselines(self, inputs: list[Inputs]) -> None:
        for name, dense in dense_baselines(self._session.ranks.device).items():
            measured = self._session.measure(
                f"{name} {self._grid.num_tokens} tokens", partial(self._baseline, name, dense, inputs)
            )
            self._one_rank_dense = self._one_rank_dense or measured

    def _baseline(self, name: str, dense: Dense, inputs: list[Inputs]) -> Measurement:
        times = self._timer(lambda number: dense(*inputs[number % len(inputs)]))
        first = self._one_rank_dense
        against, gain = (None, None) if first is None else (first.kernel, speedup(first, times))
        return Measurement(
            "attention", 1, 1, 1, self._grid.num_tokens, self._arguments.heads, self._arguments.head_dim, 1.0, name, times,
            self._tflops(1.0, times.median), against, gain, {"implementation": "dense"},
        )  # fmt: skip

    def _measure_layer(
        self,
        mesh: SequenceParallelMesh,
        inputs: list[Inputs],
        run: Run,
        baseline: Measurement | None,
        exchange: str = "ring",
    ) -> Measurement | None:
        kind = f"{mesh.ulysses_degree}x{mesh.ring_degree} {run}{', all-gather' if exchange != 'ring' else ''}"
        measured = self._session.measure(
            f"layer {kind} {self._grid.num_tokens} tokens, density {run.density:g}",
            lambda: self._layer_measurement(mesh, inputs, run, baseline, exchange),
        )
        if measured is not None and mesh.sequence_degree == 1:
            self._one_rank[run] = measured
        return measured

    def _layer_measurement(
        self,
        mesh: SequenceParallelMesh,
        inputs: list[Inputs],
        run: Run,
        baseline: Measurement | None,
        exchange: str,
    ) -> Measurement:
        recorder = AttentionRecorder()
        make_layer(self._arguments, mesh, run, exchange, recorder)(*inputs[0], grid=self._grid)
        summary = recorder.summary(mesh.groups)
        kernel, measured_density = next(iter(summary["calls"])), summary["densities"][0]["density"]
        layer = make_layer(self._arguments, mesh, run, exchange)
        times = self._timer(lambda number: layer(*inputs[number % len(inputs)], grid=self._grid))
        extra: dict[str, object] = {"implementation": "layer", "backend": run.backend, "density_asked": run.density}
        if run.remainder != "drop":
            kernel = f"{kernel}+{run.remainder}"
            extra["remainder"] = run.remainder
        extra["block_size"] = "{}x{}".format(*self._arguments.block_size)
        alone, gpus = self._one_rank.get(run), mesh.sequence_degree
        if mesh.ring_degree > 1:
            extra["kv_exchange"] = exchange
        if gpus > 1:
            extra["speedup_one_gpu_dense"] = _rounded(speedup(self._one_rank_dense, times))
            gain = speedup(alone, times)
            extra["parallel_efficiency"] = _rounded(None if gain is None else gain / gpus)
        if run.density < 1.0:
            parts = measure_breakdown(layer, inputs[0], self._grid, run.density, self._timer)
            extra |= parts.to_json(times.median, mesh.ring_degree > 1)
        # On a mesh the layer's own dense attention is the baseline of the others.
        own_baseline = gpus > 1 and run.density >= 1.0
        return Measurement(
            "attention", gpus, mesh.ulysses_degree, mesh.ring_degree, self._grid.num_tokens, self._arguments.heads,
            self._arguments.head_dim, measured_density, kernel, times, self._tflops(measured_density, times.median),
            None if baseline is None or own_baseline else _name(baseline),
            None if own_baseline else speedup(baseline, times), extra,
        )  # fmt: skip

    def _tflops(self, density: float, milliseconds: float) -> float:
        pairs = density * self._arguments.heads * self._grid.num_tokens**2
        return 4 * self._arguments.head_dim * pairs / milliseconds / 1e9


def _name(baseline: Measurement) -> str:
    return baseline.kernel if baseline.gpus == 1 else f"dense {baseline.ulysses}x{baseline.ring}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def dense_baselines(device: torch.device) -> dict[str, Dense]:
    """Dense attention by other hands that runs here, by name; the one that speed-ups are against first."""
    if device.type != "cuda":
        return {"sdpa_dense": _sdpa}
    found: dict[str, Dense] = {"cudnn_dense": _cudnn}
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return found
    # In a function of its own: its further arguments are not those of the others.
    found["fa4_dense"] = lambda query, key, value: flash_attn_func(query, key, value)
    return found


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(query, key, value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
