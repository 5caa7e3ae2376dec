"""PSNR and SSIM against measured density below 1, a line a variant, as PNGs."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from sp_sparse.fidelity.store import FLOOR
from sp_sparse.fidelity.summary import Summary
from sp_sparse.fidelity.tables import told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {"psnr": "PSNR, dB", "ssim": "SSIM"}


def quality_plots(summary: Summary) -> dict[str, bytes]:
    """The pictures by their file names."""
    pictures = {}
    for metric in _AXES:
        file = io.BytesIO()
        quality_figure(summary, metric).savefig(file, format="png")
        pictures[f"{metric}.png"] = file.getvalue()
    return pictures


def quality_figure(summary: Summary, metric: str) -> Figure:
    """Of `psnr` or `ssim`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, rows in summary.variants().items():
        shown = [row for row in rows if math.isfinite(row.mean(metric)) and row.density < 1.0]
        if not shown:
            continue
        densities, means = [row.density for row in shown], [row.mean(metric) for row in shown]
        (line,) = axes.plot(densities, means, marker="o", markersize=4, label=name)
        for row in shown:
            found = row.means[metric]
            if found is not None and found.low is not None and found.high is not None:
                axes.plot([row.density] * 2, [found.low, found.high], color=line.get_color(), linewidth=1, alpha=0.6)
    low, high = axes.get_ylim()
    for row in summary.rows:
        if row.kind == FLOOR:
            label = f"noise floor (another dense kernel): {told(row.means[metric], 4)}"
            axes.axhline(min(row.mean(metric), 2 * high), color="grey", linestyle=":", label=label)
    axes.set_ylim(low, high)  # a floor far above would press the curves together
    axes.set_xlabel("density of the sparse calls, as measured")
    axes.set_ylabel(f"{_AXES[metric]}, to dense attention")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    return figure
