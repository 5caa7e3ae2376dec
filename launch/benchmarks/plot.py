"""`benchmark plot`: pictures of what was measured, and what all pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.benchmarks.gpu_trace import PARTS
from launch.benchmarks.results import Row, read_results
from sp_sparse.generate.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#bbbbbb")  # Paul Tol's, for the colour-blind
_COLOUR_OF = dict(zip(("attention", "selection", "merge", "copies", "exchange"), _COLOURS, strict=False))

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
        drawn.append(_draw_timeline(row, folder / name))
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
    for (key, label), colour in zip(_PARTS, _COLOURS, strict=True):
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


def _draw_timeline(row: Row, path: Path) -> Path:
    """One call of the layer, as `benchmark timeline` wrote it: two lanes a GPU, what computes and what exchanges."""
    from matplotlib.figure import Figure

    works = row["timeline"]
    ranks = sorted({rank for rank, *_ in works})
    figure = Figure(figsize=(11, 1.4 + 0.8 * len(ranks)), layout="constrained")
    axes: Axes = figure.subplots()
    for part in PARTS:
        for rank in ranks:
            spans = [(start, end - start) for r, _, p, _, start, end in works if (r, p) == (rank, part)]
            axes.broken_barh(spans, (_lane(rank, part) - 0.4, 0.8), color=_COLOUR_OF[part])
        axes.barh([0], [0], color=_COLOUR_OF[part], label=part)  # its entry in the legend
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


def prepare(folder: Path) -> None:
    """Make the folder for pictures.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed, and pictures need it; pip install 'sp-sparse[benchmark]'"
        ) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)


def mesh_name(row: Row) -> str:
    if row["gpus"] == 1:
        return "1 rank"
    return f"U{row['ulysses']}×R{row['ring']}{' all-gather' if row.get('kv_exchange') == 'all_gather' else ''}"


def mode_name(row: Row) -> str:
    """Of a transformer; nothing for what has no modes."""
    return {None: "", True: ", compiled", False: ", eager"}[row.get("compiled")]


def title(row: Row, what: str) -> str:
    return f"{row.get('hardware', '')}, {row['sequence']:,} tokens: {what}".lstrip(", ")


def save(figure: Any, path: Path) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
