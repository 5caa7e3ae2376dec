"""`benchmark plot`: pictures of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.benchmarks.pictures import COLOURS, mesh_name, mode_name, prepare, save, title
from launch.benchmarks.plot_timeline import draw_timeline
from launch.benchmarks.results_file import Row, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = (
    ("ms_kernel", "sparse kernel"),
    ("ms_means", "block means"),
    ("ms_scores", "scores"),
    ("ms_topk", "top-k"),
    ("ms_split", "mask split"),
    ("ms_other", "communication, other"),
)
_TITLES = {"attention": "attention layer", "transformer": "transformer forward"}


def draw(results: Sequence[Path], folder: Path) -> list[Path]:
    """Draw every picture that the results give, as PNG files in `folder`; the latest of equal measurements counts.

    Raises:
        ValueError: a file that holds no results, results without anything to draw, or no matplotlib.
    """
    rows = read_results(results)
    prepare(folder)
    drawn = []
    for what in _TITLES:
        for sequence in sorted({row["sequence"] for row in rows if row["what"] == what}):
            chosen = [row for row in rows if row["what"] == what and row["sequence"] == sequence]
            # The layer at density 1 is a baseline, and so is what has no speed-up.
            sped = [row for row in chosen if row["speedup"] is not None and row["density"] < 1.0]
            parted = [row for row in chosen if "ms_kernel" in row]
            if sped:
                drawn.append(_draw_speedup(sped, what, folder / f"speedup_{what}_{sequence}.png"))
            if parted:
                drawn.append(_draw_parts(parted, folder / f"parts_{what}_{sequence}.png"))
    for row in (row for row in rows if row["what"] == "timeline"):
        name = "timeline_{sequence}_{ulysses}x{ring}_{kernel}_{density:.2f}.png".format(**row)
        drawn.append(draw_timeline(row, folder / name))
    if not drawn:
        raise ValueError(
            f"{', '.join(map(str, results))}: {len(rows)} results, nothing to draw; measure densities below 1 "
            "with `benchmark.py attention --output FILE`"
        )
    return drawn


def _draw_speedup(rows: list[Row], what: str, path: Path) -> Path:
    """One line a mesh (and kernel and mode, where there are several), and the ideal: time in proportion to density."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(_series(row, rows), []).append(row)
    for marker, (name, points) in zip("osD^vPX*" * len(lines), lines.items(), strict=False):
        points.sort(key=lambda row: row["density"])
        densities = [row["density"] for row in points]
        axes.plot(densities, [row["speedup"] for row in points], marker=marker, label=name)
    densities = sorted({row["density"] for row in rows} | {1.0})
    steps = [densities[0] + (1.0 - densities[0]) * i / 100 for i in range(101)]
    axes.plot(steps, [1 / d for d in steps], color="black", linestyle="--", linewidth=1, label="ideal, 1 / density")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlim(right=1.02)
    axes.set_xlabel("density (share of query-key pairs attended)")
    axes.set_ylabel("speed-up over dense on as many GPUs")
    axes.set_title(title(rows[0], _TITLES[what]))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    return save(figure, path)


def _draw_parts(rows: list[Row], path: Path) -> Path:
    """A bar for every mesh and density, stacked of the layer's parts."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: (row["gpus"], -row["ulysses"], row["kernel"], -row["density"]))
    figure = Figure(figsize=(max(7.0, 0.75 * len(rows) + 2), 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    heights = [0.0] * len(rows)
    for (key, label), colour in zip(_PARTS, COLOURS, strict=True):
        # A part that is within the noise of the layer's own time may come out below 0.
        values = [max(row[key], 0.0) for row in rows]
        axes.bar(range(len(rows)), values, bottom=heights, color=colour, label=label, width=0.75)
        heights = [low + value for low, value in zip(heights, values, strict=True)]
    for place, (row, height) in enumerate(zip(rows, heights, strict=True)):
        axes.annotate(f"{row['overhead_percent']:+.0f} %", (place, height), ha="center", va="bottom", fontsize=8)
    several = len({row["kernel"] for row in rows}) > 1
    names = [f"{row['density']:.2f}\n{mesh_name(row)}" + (f"\n{row['kernel']}" if several else "") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.margins(y=0.08)
    axes.set_xlabel("density and mesh (U Ulysses × R ring)")
    axes.set_ylabel("milliseconds of a layer")
    axes.set_title(title(rows[0], "where the time goes; above each bar, what comes on top of the kernel"), fontsize=10)
    axes.legend(fontsize=8)
    return save(figure, path)


def _series(row: Row, rows: list[Row]) -> str:
    name = mesh_name(row)
    if len({other["kernel"] for other in rows}) > 1:
        name += f", {row['kernel']}"
    if len({other.get("compiled") for other in rows}) > 1:
        name += mode_name(row)
    return name
