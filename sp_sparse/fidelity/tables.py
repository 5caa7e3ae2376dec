"""Tables as text, as Markdown and as HTML."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from sp_sparse.fidelity.statistics import Estimate
from sp_sparse.fidelity.summary import Summary

NONE = "–"

# A bootstrap over fewer clusters gives intervals that are too narrow.
_FEW_PROMPTS = 20


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
    few = "; too narrow with so few" if summary.prompts < _FEW_PROMPTS else ""
    note = (
        "Against the model's own dense attention from the same noise. Density: of sparse calls, as measured. In brackets: "
        f"95 % intervals by bootstrap over {summary.prompts} prompts, each with all its seeds{few}. Δ: paired difference at "
        f"the same prompts and seeds to the setting with {summary.baseline_told}; * where its interval excludes 0. "
        "Seconds: of denoising, median."
    )
    return Table("Quality", note, tuple(header), tuple(rows))


def equal_quality_table(summary: Summary) -> Table:
    """The density that each variant needs for the baseline's mean PSNR."""
    rows = [
        (equal.variant, f"{equal.density:.3f}", f"{equal.psnr:.2f}", _told_needed(*equal.needed))
        for equal in summary.equal_quality()
    ]
    note = (
        f"The density from which on each variant has at least the mean PSNR of the one with {summary.baseline_told}, "
        "over the videos that both have, interpolated between the densities that were measured."
    )
    return Table("Density for equal quality", note, ("variant", "baseline's density", "PSNR dB", "needs"), tuple(rows))


def _told_needed(low: float, high: float) -> str:
    if low == high:
        return f"{low:.3f}"
    return f"below {high:.3f}" if low == 0.0 else f"above {low:.3f}"


def told(found: Estimate | None, digits: int, signed: bool = False) -> str:
    """`22.18 [21.90, 22.40]`; with `*` for a difference whose interval excludes 0."""
    if found is None:
        return NONE
    sign = "+" if signed else ""
    if math.isinf(found.mean):
        return "∞"
    # + 0.0: no zero has a sign.
    mean, *ends = (
        f"{round(x, digits) + 0.0:{sign}.{digits}f}" for x in (found.mean, found.low, found.high) if x is not None
    )
    if not ends:
        return mean
    star = "*" if signed and found.excludes_zero else ""
    return f"{mean}{star} [{', '.join(ends)}]"
