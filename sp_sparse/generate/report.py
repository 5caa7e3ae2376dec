"""The report of a job: what was asked for, what really ran, how long it took and on what."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sp_sparse
from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.files import whole_file
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.stages import Stages


def job_report(
    arguments: GenerateArguments,
    ranks: Ranks,
    stages: Stages,
    comings: dict[str, int] | None,
    attention: dict[str, Any] | None,
    videos: Sequence[dict[str, Any]],
    verified: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything but the writing. A collective call."""
    steps = [seconds for video in videos for run in video["step_seconds"] for seconds in (run[1:] or run)]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": asdict(arguments),
        "ranks": ranks.world,
        "mesh": {
            "ulysses_degree": arguments.ulysses_degree,
            "ring_degree": arguments.ring_degree,
            "cfg_degree": arguments.cfg_parallel_degree,
            "reason": arguments.mesh_reason,
        },
        "attention": attention,
        # The first step of a run prepares and compiles, so it is left out where there are others.
        "seconds_per_step": median(steps),
        "seconds": stages.seconds,
        # The options that decide it, and with --offload idle how often each part came to the device.
        "memory": {**asdict(arguments.memory), "comings": comings},
        "peak_memory": stages.peak_memory(),
        "videos": list(videos),
        "verify": verified,
        "versions": versions("diffusers", "transformers", "triton"),
        "hardware": _hardware(ranks.device),
    }


def attention_report(
    config: SparseAttentionConfig, recorder: AttentionRecorder, mesh: SequenceParallelMesh
) -> dict[str, Any] | None:
    """What sparse attention did, measured from its masks; None where it was off. A collective call.

    `calls` and `kv_exchange` are those of this rank; the rest is over all ranks.
    """
    if config.backend == "none":
        return None
    summary = recorder.summary(mesh.groups)
    densities = summary["densities"]
    return {
        "calls": summary["calls"],
        # On a ring: how keys and values went over it, why so, and in how many calls of this rank.
        "kv_exchange": summary["kv_exchange"],
        "dense_calls": sum(place["dense_calls"] for place in densities),
        # Every (expert, layer, step) attends equally many pairs when dense; of VACE a layer and its control block are one.
        "mean_density": sum(place["density"] for place in densities) / len(densities),
        "densities": densities,
    }


def exchanges_told(attention: dict[str, Any]) -> str:
    """`kv_exchange` of an attention report in a line; empty without a ring."""
    return "; ".join(f"{one['name']} x {one['calls']} ({one['reason']})" for one in attention["kv_exchange"])


def write_report(report: dict[str, Any], path: Path) -> None:
    """As JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, torch, sp_sparse and those packages that are installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "sp_sparse": sp_sparse.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda
    return found
