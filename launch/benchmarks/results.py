"""Measurements: as they are written and read again, with what they were made on, and the table of many."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks.timing import Times
from sp_sparse.generate.report import versions

Row = dict[str, Any]

_NEEDED = ("what", "gpus", "ulysses", "ring", "sequence", "density", "kernel", "ms_median", "speedup")

_PACKAGES = (
    "triton",
    "diffusers",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "flashinfer-python",
    "vllm-omni",
    "vllm",
    "fa3-fwd",
)


@dataclass(frozen=True)
class Measurement:
    """What ran, how long it took, and how that compares.

    Attributes:
        what: `attention`, `timeline` or `transformer`.
        gpus, ulysses, ring: the mesh.
        sequence: tokens of the whole video.
        density: share of attended pairs; for a transformer that asked for.
        kernel: what attended, as it was chosen.
        times: milliseconds of a call, the slowest rank's.
        tflops_attended: of all GPUs together; None where more than attention is timed.
        baseline: what `speedup` is against; None for what is a baseline itself.
        extra: further keys, put last.
    """

    what: str
    gpus: int
    ulysses: int
    ring: int
    sequence: int
    heads: int
    head_dim: int
    density: float
    kernel: str
    times: Times
    tflops_attended: float | None
    baseline: str | None
    speedup: float | None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self, environment: dict[str, Any]) -> dict[str, Any]:
        return {
            "what": self.what,
            "gpus": self.gpus,
            "ulysses": self.ulysses,
            "ring": self.ring,
            "sequence": self.sequence,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "density": round(self.density, 4),
            "kernel": self.kernel,
            "ms_median": round(self.times.median, 4),
            "ms_min": round(self.times.least, 4),
            "ms_max": round(self.times.most, 4),
            "tflops_attended": _rounded(self.tflops_attended, 1),
            "baseline": self.baseline,
            "speedup": _rounded(self.speedup, 3),
            **environment,
            **self.extra,
            "peak_memory": self.times.peak_memory,
        }


def environment(device: torch.device) -> dict[str, Any]:
    """On what, with what and when something is measured: the keys `hardware`, `versions` and `date` of a result."""
    found, hardware = versions(*_PACKAGES), f"CPU {platform.machine()}"
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        hardware = torch.cuda.get_device_name(device)
    return {"hardware": hardware, "versions": found, "date": date.today().isoformat()}


def speedup(baseline: Measurement | None, times: Times) -> float | None:
    return None if baseline is None else baseline.times.median / times.median


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `Measurement.to_json`, aligned; a column without any value is left out."""
    cells = [[title for title, _ in _COLUMNS]]
    cells += [[read(row) for _, read in _COLUMNS] for row in rows]
    columns = [column for column in zip(*cells, strict=True) if any(value != "-" for value in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row.get(key) is None else format(row[key], form)


def _gib(row: dict[str, Any]) -> str:
    return "-" if row.get("peak_memory") is None else f"{row['peak_memory'] / 2**30:.2f}"


def _mode(row: dict[str, Any]) -> str:
    return {None: "-", True: "compiled", False: "eager"}[row.get("compiled")]


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("gpus", _number("gpus", "d")),
    ("UxR", lambda row: f"{row['ulysses']}x{row['ring']}"),
    ("tokens", _number("sequence", "d")),
    ("by", _number("implementation", "")),
    ("mode", _mode),
    ("density", _number("density", ".3f")),
    ("kernel", _number("kernel", "")),
    ("ms", _number("ms_median", ".2f")),
    ("min", _number("ms_min", ".2f")),
    ("max", _number("ms_max", ".2f")),
    ("ms/layer", _number("ms_per_layer", ".2f")),
    ("TFLOP/s", _number("tflops_attended", ".0f")),
    ("x dense", _number("speedup", ".2f")),
    ("of", _number("baseline", "")),
    ("x 1-GPU dense", _number("speedup_one_gpu_dense", ".2f")),
    ("efficiency", _number("parallel_efficiency", ".2f")),
    ("kernel ms", _number("ms_kernel", ".2f")),
    ("means", _number("ms_means", ".2f")),
    ("scores", _number("ms_scores", ".2f")),
    ("top-k", _number("ms_topk", ".2f")),
    ("split", _number("ms_split", ".2f")),
    ("remainder", _number("ms_remainder", ".2f")),
    ("other", _number("ms_other", ".2f")),
    ("overhead %", _number("overhead_percent", ".1f")),
    ("exchange by", _number("kv_exchange", "")),
    ("attention", _number("ms_attention", ".2f")),
    ("selection", _number("ms_selection", ".2f")),
    ("exchange", _number("ms_exchange", ".2f")),
    ("exposed", _number("ms_exposed", ".2f")),
    ("merge", _number("ms_merge", ".2f")),
    ("copies", _number("ms_copies", ".2f")),
    ("idle", _number("ms_idle", ".2f")),
    ("peak GiB", _gib),
    ("peak/dense", _number("peak_memory_ratio", ".2f")),
)


def read_results(paths: Sequence[Path]) -> list[Row]:
    """The rows of several files; the latest of equal measurements counts.

    Raises:
        ValueError: a file that holds anything else.
    """
    return list({identity(row): row for path in paths for row in _read(path)}.values())


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); give a file that --output wrote") from error
        missing = [key for key in _NEEDED if key not in row] if isinstance(row, dict) else list(_NEEDED)
        if missing:
            raise ValueError(
                f"{path} line {number} has no {', '.join(missing)}; give a file that `benchmark.py attention` or "
                "`benchmark.py transformer` wrote"
            )
        rows.append(row)
    return rows


def identity(row: Row) -> tuple[Any, ...]:
    """What two measurements of the same have in common."""
    optional = (
        "density_asked",
        "block_size",
        "backend",
        "implementation",
        "compiled",
        "layers",
        "hardware",
        "kv_exchange",
    )
    return tuple(row[key] for key in _NEEDED[:7]) + tuple(row.get(key) for key in optional)
