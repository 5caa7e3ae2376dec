"""The picture of one call of the layer: two lanes a GPU, what computes and what communicates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.gpu_trace import PARTS
from launch.benchmarks.pictures import COLOURS, mesh_name, save, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR = dict(zip(("attention", "selection", "merge", "copies", "exchange"), COLOURS, strict=False))


def draw_timeline(row: dict[str, Any], path: Path) -> Path:
    """Draw a row that `benchmark timeline` wrote."""
    from matplotlib.figure import Figure

    works = row["timeline"]
    ranks = sorted({rank for rank, *_ in works})
    figure = Figure(figsize=(11, 1.4 + 0.8 * len(ranks)), layout="constrained")
    axes: Axes = figure.subplots()
    for part in PARTS:
        for rank in ranks:
            spans = [(start, end - start) for r, _, p, _, start, end in works if (r, p) == (rank, part)]
            axes.broken_barh(spans, (_lane(rank, part) - 0.4, 0.8), color=_COLOUR[part])
        axes.barh([0], [0], color=_COLOUR[part], label=part)  # its entry in the legend
    axes.set_yticks(
        [_lane(rank, part) for rank in ranks for part in ("attention", "exchange")],
        [f"GPU {rank} {what}" for rank in ranks for what in ("computes", "exchanges")],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, row["ms_median"])
    axes.set_xlabel("milliseconds")
    axes.set_title(title(row, f"{mesh_name(row)}, {row['kernel']}, density {row['density']:.2f}"), fontsize=10)
    axes.legend(fontsize=8, ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return save(figure, path)


def _lane(rank: int, part: str) -> int:
    return 2 * rank + (part == "exchange")
