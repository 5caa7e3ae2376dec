"""`benchmark scaling`: what more GPUs bring, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.benchmarks.plot import mesh_name, mode_name, prepare, save, title
from launch.benchmarks.results import Row, identity, read_results
from sp_sparse.generate.files import whole_file

# Ours on a mesh; the other rows are baselines.
_OURS = ("layer", "sp_sparse")
_MARKERS = {"Ulysses": "o", "ring": "s", "hybrid": "D"}


@dataclass(frozen=True)
class Point:
    """A measurement on a mesh, and how it compares with one GPU in the same file.

    Attributes:
        speedup: how many times as fast as the same on one GPU.
    """

    row: Row
    speedup: float

    @property
    def efficiency(self) -> float:
        return self.speedup / self.row["gpus"]

    @property
    def kind(self) -> str:
        ulysses, ring = self.row["ulysses"] > 1, self.row["ring"] > 1
        return "hybrid" if ulysses and ring else "ring" if ring else "Ulysses"


def report_scaling(results: Sequence[Path], folder: Path) -> list[Path]:
    """Write `scaling.md` and a picture for every number of tokens; the latest of equal measurements counts.

    Raises:
        ValueError: files that hold no results, none of them on several GPUs and on one, or no matplotlib.
    """
    latest = {identity(point.row): point for path in results for point in _points(read_results([path]))}
    points = sorted(latest.values(), key=_place)
    if not points:
        raise ValueError(
            f"{', '.join(map(str, results))}: nothing is measured both on one GPU and on several; give what "
            "`torchrun --nproc-per-node N launch/benchmark.py attention --output FILE` wrote"
        )
    prepare(folder)
    written = [folder / "scaling.md"]
    with whole_file(written[0]) as temporary:
        temporary.write_text(_table(points), encoding="utf-8")
    for what, sequence in sorted({(point.row["what"], point.row["sequence"]) for point in points}):
        chosen = [p for p in points if (p.row["what"], p.row["sequence"]) == (what, sequence)]
        written.append(_draw(chosen, folder / f"scaling_{what}_{sequence}.png"))
    return written


def _points(rows: list[Row]) -> list[Point]:
    ours = [row for row in rows if row.get("implementation") in _OURS and row.get("kv_exchange") != "all_gather"]
    alone = {_same(row): row["ms_median"] for row in ours if row["gpus"] == 1}
    several = [row for row in ours if row["gpus"] > 1 and _same(row) in alone]
    return [Point(row, alone[_same(row)] / row["ms_median"]) for row in several]


def _place(point: Point) -> tuple[Any, ...]:
    row = point.row
    return row["what"], row["sequence"], -row["density"], row["gpus"], -row["ulysses"]


def _same(row: Row) -> tuple[Any, ...]:
    """What a measurement has in common with the same on another mesh."""
    density = row.get("density_asked", row["density"])
    return row["what"], row["sequence"], row["kernel"], density, row.get("compiled")


def _table(points: list[Point]) -> str:
    """Milliseconds, times as fast as one GPU, and efficiency: a line for each mesh and density."""
    lines = [
        "| what | tokens | kernel | density | GPUs | mesh | ms | × one GPU | efficiency | × dense on as many |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        row = point.row
        what = row["what"] + mode_name(row)
        dense = "–" if row["speedup"] is None else f"{row['speedup']:.2f}"
        lines.append(
            f"| {what} | {row['sequence']} | {row['kernel']} | {row['density']:.2f} | {row['gpus']} | {mesh_name(row)} "
            f"| {row['ms_median']:.2f} | {point.speedup:.2f} | {point.efficiency:.2f} | {dense} |"
        )
    return "\n".join(lines) + "\n"


def _draw(points: list[Point], path: Path) -> Path:
    """Speed-up over one GPU against the number of GPUs; one line a density, kernel and kind of mesh."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        row = point.row
        name = f"{row['kernel']}, density {row['density']:.2f}{mode_name(row)}"
        lines.setdefault((point.kind, name), []).append(point)
    for (kind, name), line in lines.items():
        gpus = [1, *(point.row["gpus"] for point in line)]
        axes.plot(gpus, [1.0, *(point.speedup for point in line)], marker=_MARKERS[kind], label=f"{kind}, {name}")
    most = max(point.row["gpus"] for point in points)
    axes.plot([1, most], [1, most], color="black", linestyle="--", linewidth=1, label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times as fast as one GPU")
    axes.set_title(title(points[0].row, f"{points[0].row['what']}, scaling"), fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)
    return save(figure, path)
