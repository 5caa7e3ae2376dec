"""PSNR and SSIM against measured density below 1, a line a variant, as PNGs."""

from __future__ import annotations

import io
import math

from sp_sparse.fidelity.store import FLOOR
from sp_sparse.fidelity.summary import Summary
from sp_sparse.fidelity.tables import told

_AXES = {"psnr": "PSNR, dB", "ssim": "SSIM"}


def quality_plots(summary: Summary) -> dict[str, bytes]:
    """The pictures by their file names."""
    return {f"{metric}.png": _plot(summary, metric) for metric in _AXES}


def _plot(summary: Summary, metric: str) -> bytes:
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
    axes.autoscale(False)  # a floor far above would press the curves together
    for row in summary.rows:
        if row.kind == FLOOR:
            label = f"noise floor (another dense kernel): {told(row.means[metric], 3)}"
            height = row.mean(metric) if math.isfinite(row.mean(metric)) else axes.get_ylim()[1]
            axes.axhline(height, color="grey", linestyle=":", label=label)
    axes.set_xlabel("density of the sparse calls, as measured")
    axes.set_ylabel(f"{_AXES[metric]}, to dense attention")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
