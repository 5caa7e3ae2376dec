"""`benchmark timeline`: what every GPU does during one call of the layer, kernel by kernel."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from launch.benchmarks.arguments import Run, TimelineArguments
from launch.benchmarks.gpu_trace import GpuWork, digest, read_trace
from launch.benchmarks.inputs import make_layer, shard_inputs
from launch.benchmarks.results import Measurement
from launch.benchmarks.session import Session, free_memory
from launch.benchmarks.timing import Times, line_up
from sp_sparse import AttentionRecorder, SequenceParallelMesh, VideoGrid
from sp_sparse.generate.ranks import Ranks


def measure_timelines(session: Session, arguments: TimelineArguments) -> None:
    """One call for every grid, mesh and run. A collective call."""
    meshes = arguments.build_meshes(session.ranks.world)
    for grid in arguments.grids:
        for mesh in meshes:
            for run in arguments.runs():
                free_memory()
                label = f"timeline {mesh.ulysses_degree}x{mesh.ring_degree} {run} {grid.num_tokens} tokens"
                take = partial(_timeline, session.ranks, arguments, mesh, grid, run)
                session.measure(f"{label}, density {run.density:g}", take)


def _timeline(
    ranks: Ranks,
    arguments: TimelineArguments,
    mesh: SequenceParallelMesh,
    grid: VideoGrid,
    run: Run,
) -> Measurement:
    inputs = shard_inputs(arguments, mesh, grid, ranks)
    recorder = AttentionRecorder()
    make_layer(arguments, mesh, run, recorder=recorder)(*inputs, grid=grid)
    summary = recorder.summary(mesh.groups)
    layer = make_layer(arguments, mesh, run)
    for _ in range(arguments.warmup):
        layer(*inputs, grid=grid)
    works = [work for of_rank in ranks.gather(_profiled(lambda: layer(*inputs, grid=grid), ranks)) for work in of_rank]
    span = max(work.end for work in works)
    rows = [[w.rank, w.stream, w.part, w.name, w.start, w.end] for w in works]
    return Measurement(
        "timeline", mesh.sequence_degree, mesh.ulysses_degree, mesh.ring_degree, grid.num_tokens, arguments.heads,
        arguments.head_dim, summary["densities"][0]["density"], next(iter(summary["calls"])),
        Times(span, span, span, None), None, None, None,
        {
            "backend": run.backend, "density_asked": run.density, "remainder": run.remainder, **digest(works),
            "timeline": rows,
        },
    )  # fmt: skip


def _profiled(call: Callable[[], object], ranks: Ranks) -> list[GpuWork]:
    """What this rank's GPU does in `call`, which every rank begins together. A collective call."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        line_up(ranks)
        torch.cuda._sleep(1)  # the mark from which times count
        call()
        torch.cuda.synchronize(ranks.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"], ranks.rank)
