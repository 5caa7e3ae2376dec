"""Tables as text, as Markdown and as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sp_sparse.fidelity.statistics import Estimate
from sp_sparse.fidelity.summary import Summary

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of texts under a title; `note` says how to read them."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        told = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{told}\n"

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        told = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return f"{self.title}\n{self.note}\n\n" + "\n".join(told) + "\n"

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self.rows)
        title, note = html.escape(self.title), html.escape(self.note)
        return f"<h2>{title}</h2><p>{note}</p><table><tr>{head}</tr>{body}</table>"


def quality_table(summary: Summary) -> Table:
    """One row a setting; columns that nothing fills are left out."""
    digits = {"psnr": 2, "ssim": 4, "lpips": 4, "caption": 3}
    names = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS", "caption": "caption"}
    measured = [name for name in names if any(row.means[name] for row in summary.rows)]
    header = ["setting", "density", "of all calls"]
    for name in measured:
        header += [names[name], f"Δ {names[name]}"]
    header += ["seconds", "videos"]
    rows = []
    for row in summary.rows:
        cells = [row.label, f"{row.density:.3f}", f"{row.density_all:.3f}"]
        for name in measured:
            cells += [told(row.means[name], digits[name]), told(row.gains[name], digits[name], signed=True)]
        rows.append((*cells, f"{row.seconds:.2f}", str(row.videos)))
    note = (
        "Against the model's own dense attention from the same noise. Density: of sparse calls, as measured. In brackets: "
        "95 % intervals by bootstrap over prompts, each with all its seeds. Δ: paired difference at the same prompts and "
        f"seeds to the setting with {summary.baseline}; * where its interval excludes 0. Seconds: of denoising, median."
    )
    return Table("Quality", note, tuple(header), tuple(rows))


def equal_quality_table(summary: Summary) -> Table:
    """The density that each variant needs for the baseline's mean PSNR."""
    rows = [
        (name, f"{density:.3f}", f"{psnr:.2f}", NONE if needed is None else f"{needed:.3f}")
        for name, density, psnr, needed in summary.equal_quality()
    ]
    note = (
        f"What each variant needs for the mean PSNR of the one with {summary.baseline}, interpolated between its own "
        f"densities; {NONE} where they do not enclose it."
    )
    return Table("Density for equal quality", note, ("variant", "baseline's density", "PSNR dB", "needs"), tuple(rows))


def told(found: Estimate | None, digits: int, signed: bool = False) -> str:
    """`22.18 [21.90, 22.40]`; with `*` for a difference whose interval excludes 0."""
    if found is None:
        return NONE
    sign = "+" if signed else ""
    if math.isinf(found.mean):
        return "∞"
    mean = f"{found.mean:{sign}.{digits}f}"
    if found.low is None:
        return mean
    star = "*" if signed and found.excludes_zero else ""
    return f"{mean}{star} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"
