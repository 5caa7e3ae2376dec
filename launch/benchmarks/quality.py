"""`benchmark quality`: what `sp_sparse.fidelity` measured, joined with the speeds of the same settings."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.benchmarks.plot import mesh_name, mode_name, prepare, save
from launch.benchmarks.results import Row as Speed
from launch.benchmarks.results import read_results
from sp_sparse import SparseAttentionConfig
from sp_sparse.config import REMAINDERS
from sp_sparse.fidelity.plan import Baseline, Setting
from sp_sparse.fidelity.plots import quality_plots
from sp_sparse.fidelity.store import NEEDED, Item
from sp_sparse.fidelity.summary import EqualQuality, Row, Summary, summarize
from sp_sparse.fidelity.tables import NONE, Table, told
from sp_sparse.generate.files import whole_file

BEGIN, END = "<!-- begin: benchmark.py quality -->", "<!-- end: benchmark.py quality -->"

# Masks keep whole blocks: a density that was asked for is a little another one on each grid.
_BEYOND = 0.02
# Videos, below which an interval says nothing.
_FEW = 6


def write_quality(fidelity: Sequence[Path], speeds: Sequence[Path], document: Path, folder: Path) -> list[Path]:
    """Put the tables between the marks of `document`, and the plots into `folder`.

    Raises:
        ValueError: files that hold something else, no setting of one selector with and without a remainder, no marks in
            the document, or no matplotlib.
    """
    lines = read_fidelity(fidelity)
    prepare(folder)
    before, after = _around(document)
    kept = _usual(lines)
    tables = [_choices(lines), _means(summarize(lines, _WITHOUT_REMAINDER)), _equal(lines)]
    times = _curves(read_results(speeds))
    tables.append(_speed(kept, times))
    written = []
    for name, picture in quality_plots(kept).items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(picture)
        written.append(folder / name)
    written.append(_draw(kept, times, folder / "speed.png"))
    text = "\n".join(table.markdown() for table in tables if table.rows)
    with whole_file(document) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    return [document, *written]


def read_fidelity(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of several files, `.jsonl` or `.jsonl.gz`, one for each video; the last of equal ones counts.

    Raises:
        ValueError: a line that is none of `sp_sparse.fidelity`.
    """
    found: dict[Item, dict[str, Any]] = {}
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, text in enumerate(data.decode().splitlines(), 1):
            try:
                line = json.loads(text)
                found[Item.of_line({name: line[name] for name in NEEDED})] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} cannot be read ({error}); give a fidelity.jsonl that sp_sparse.fidelity wrote"
                ) from error
    return list(found.values())


@dataclass(frozen=True)
class _Curve:
    """Milliseconds of one thing at its measured densities, for each remainder, beside dense attention."""

    name: str
    dense: float
    points: Mapping[str, Sequence[tuple[float, float]]]

    def ms(self, remainder: str, density: float) -> float | None:
        """On the straight line between two measured densities, and a little beyond the ends; None further away."""
        points = sorted(self.points.get(remainder, ()))
        for (low, first), (high, last) in pairwise(points):
            if low - (low == points[0][0]) * _BEYOND <= density <= high + (high == points[-1][0]) * _BEYOND:
                return first + (density - low) / (high - low) * (last - first)
        return None


def _curves(rows: Sequence[Speed]) -> list[_Curve]:
    """Of the layer and the transformer, at each size, on each mesh, as far as one remainder beside `drop` was measured."""
    groups: dict[str, list[Speed]] = {}
    for row in rows:
        if row.get("implementation") in ("layer", "sp_sparse") and row["density"] < 1.0 and row["speedup"]:
            kernel = row["kernel"].partition("+")[0]
            size = f"{row.get('hardware', '')}, {row['sequence']:,} tokens"
            name = f"{row['what']}{mode_name(row)}, {kernel}, {size}, {mesh_name(row)}"
            if row.get("kv_exchange") != "all_gather":
                groups.setdefault(name, []).append(row)
    found = []
    for name, group in groups.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for row in group:
            points.setdefault(row["kernel"].partition("+")[2] or "drop", []).append((row["density"], row["ms_median"]))
        if len(points) > 1:
            found.append(_Curve(name, group[0]["ms_median"] * group[0]["speedup"], points))
    return found


_WITHOUT_REMAINDER = Baseline({"remainder": "drop"})


def _usual(lines: Sequence[Mapping[str, Any]]) -> Summary:
    """Of the default selector alone, everything but remainder and density as in most settings."""
    settings = {Setting.from_json(line["setting"]) for line in lines if line["setting"] is not None}
    usual = {}
    for entry in fields(Setting):
        if entry.name not in ("remainder", "density"):
            usual[entry.name] = Counter(getattr(setting, entry.name) for setting in settings).most_common(1)[0][0]
    usual["selector"] = SparseAttentionConfig().selector

    def is_usual(line: Mapping[str, Any]) -> bool:
        setting = line["setting"] and Setting.from_json(line["setting"])
        return not setting or replace(setting, **usual) == setting

    kept = [line for line in lines if is_usual(line)]
    if {line["setting"]["remainder"] for line in kept if line["setting"]} <= {"drop"}:
        raise ValueError(
            "no remainder was measured beside drop with the default selector; run sp_sparse.fidelity with --remainders "
            "drop,linear into the same folder"
        )
    return summarize(kept, _WITHOUT_REMAINDER)


def _matrix(title: str, note: str, summary: Summary, cell: Callable[[Row], str], first: str = "setting") -> Table:
    """A row a variant, a column a density that was asked for; variants of which nothing is told are left out."""
    densities = sorted({row.setting.density for row in summary.settings if row.setting is not None})
    rows = []
    for name, variant in summary.variants().items():
        cells = {row.setting.density: cell(row) for row in variant if row.setting is not None}
        if set(cells.values()) - {NONE}:
            rows.append((name, *(cells.get(density, NONE) for density in densities)))
    return Table(title, note, (first, *(f"d={density:g}" for density in densities)), tuple(rows))


def _choices(lines: Sequence[Mapping[str, Any]]) -> Table:
    """What each part of a setting brings over its default at equal density, all else equal."""
    default = SparseAttentionConfig()
    rows: list[tuple[str, ...]] = []
    header: tuple[str, ...] = ()
    parts: dict[str, Any] = {"remainder": "drop", "selector": default.selector, "order": default.token_order}
    parts |= {"keep_diagonal": default.keep_diagonal, "keep_first_frame": default.keep_first_frame}
    settings = [Setting.from_json(line["setting"]) for line in lines if line["setting"] is not None]
    for name in ("dense_steps", "block_size"):
        parts[name] = min(getattr(setting, name) for setting in settings)
    for name, value in parts.items():
        if len({getattr(setting, name) for setting in settings}) > 1:
            summary = summarize(lines, Baseline({name: value}))
            table = _matrix("", "", summary, _gain)
            over = summary.baseline_told
            rows += [(f"{line[0]}, over {over}", *line[1:]) for line in table.rows]
            header = table.header
    note = (
        "dB of PSNR at equal density, paired by prompt and seed, with 95 % intervals; * where they exclude 0. Of fewer than "
        f"{_FEW} videos only the mean is told, with their number in brackets: hints, no findings."
    )
    return Table("What a choice brings", note, header, tuple(rows))


def _gain(row: Row) -> str:
    found = row.gains["psnr"]
    if found is not None and found.count < _FEW and math.isfinite(found.mean):
        return f"{found.mean:+.2f} ({found.count})"
    return told(found, 2, signed=True)


def _means(summary: Summary) -> Table:
    def cell(row: Row) -> str:
        caption = row.means["caption"]
        share = "" if caption is None else f" · {caption.mean:.0%}"
        return f"{row.mean('psnr'):.2f} · {row.mean('ssim'):.3f}{share} ({row.videos})"

    dense = {row.kind: row.means["caption"] for row in summary.rows if row.setting is None}
    told_dense = "".join(f" Dense: {found.mean:.0%}." for kind, found in dense.items() if kind == "dense" and found)
    note = (
        "PSNR in dB · SSIM · captions followed (videos), to the model's own dense attention from the same noise."
        f"{told_dense} Rows with fewer videos are of other prompts too: compare by the differences above."
    )
    return _matrix("Quality against density", note, summary, cell)


def _equal(lines: Sequence[Mapping[str, Any]]) -> Table:
    default = SparseAttentionConfig()
    summary = summarize(lines, Baseline({"remainder": "drop", "selector": default.selector}))
    equal: dict[tuple[Setting, str], EqualQuality] = {}
    for one in summary.equal_quality():
        equal[one.of, f"{one.density:.4f}"] = one
    by_setting = {row.setting: row for row in summary.settings}

    def cell(row: Row) -> str:
        assert row.setting is not None
        twin = by_setting.get(summary.baseline.twin(row.setting))
        one = None if twin is None else equal.get((row.setting.variant, f"{twin.density:.4f}"))
        return NONE if one is None else _needed(one.needed)

    note = (
        f"The measured density from which on a setting is as good as {summary.baseline_told} at the density of the column, "
        "by mean PSNR over the videos that both have, between the densities that were measured."
    )
    return _matrix("Density needed for equal quality", note, summary, cell)


def _needed(needed: tuple[float, float]) -> str:
    low, high = needed
    return f"{low:.3f}" if low == high else f"below {high:.3f}" if low == 0.0 else f"above {low:.3f}"


def _speed(summary: Summary, curves: Sequence[_Curve]) -> Table:
    """What the density of equal quality takes, beside what dropping takes at its own."""
    rows = []
    for curve in curves:
        for one in summary.equal_quality():
            low, high = one.needed
            drop = curve.ms("drop", one.density)
            ms = curve.ms(one.of.remainder, high)
            if drop is None or ms is None or high == 1.0:
                continue
            bound, least = ("", "") if low == high else ("≤ ", "≥ ")
            rows.append(
                (
                    curve.name, f"{one.psnr:.2f}", f"{one.density:.3f}: {drop:.1f} ms, {curve.dense / drop:.2f}×",
                    one.of.remainder, f"{bound}{high:.3f}: {bound}{ms:.1f} ms, {least}{curve.dense / ms:.2f}×",
                    f"{least}{drop / ms:.2f}×",
                )
            )  # fmt: skip
    note = (
        "Milliseconds, and how many times as fast as dense attention on as many GPUs, at the density that gives the same "
        "PSNR: quality by mini, speed by layers and transformers of A14B's shape, on the line between two measured "
        f"densities (at most {_BEYOND:g} beyond them). That equal density is equal quality need not hold for another model."
    )
    header = ("what", "PSNR dB", "drop: density, time", "remainder", "density, time", "as fast as drop")
    return Table("Speed at equal quality", note, header, tuple(rows))


def _draw(summary: Summary, curves: Sequence[_Curve], path: Path) -> Path:
    """PSNR against how many times as fast as dense attention: a line a remainder, a picture a layer on one GPU."""
    from matplotlib.figure import Figure

    shown = [curve for curve in curves if curve.name.endswith("1 rank")]
    figure = Figure(figsize=(6 * max(1, len(shown)), 4.4), dpi=110, layout="constrained")
    for number, curve in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), number)
        for remainder in REMAINDERS:
            points = []
            for row in summary.settings:
                assert row.setting is not None
                ms = curve.ms(remainder, row.density) if row.setting.remainder == remainder else None
                if ms is not None and math.isfinite(row.mean("psnr")):
                    points.append((curve.dense / ms, row.mean("psnr")))
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=remainder)
        axes.set_title(curve.name, fontsize=8)
        axes.set_xlabel("times as fast as dense attention")
        axes.set_ylabel("PSNR of mini, dB, to dense attention")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return save(figure, path)


def _around(document: Path) -> tuple[str, str]:
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {BEGIN} and {END}; put them where the tables shall stand")
    return before, after
