"""What was simulated, as tables and a picture in which measured and modelled stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path

import numpy as np

from launch.benchmarks.simulation.check import Checked
from launch.benchmarks.simulation.costs import Costs
from launch.benchmarks.simulation.replay import EXCHANGES, Cluster, Layer, Mesh
from launch.benchmarks.simulation.scenarios import Simulated
from launch.benchmarks.simulation.work import LayerSize
from sp_sparse.generate.recorded_masks import RecordedMasks

_RINGS = (2, 4, 8)
# Heads that do not divide: of A14B at 720p and of TI2V-5B at its own size.
_UNEVEN = ((75600, 40, (3, 6, 7)), (27280, 24, (5, 7)))


def scaling_table(found: Sequence[Simulated], checked: Sequence[Checked]) -> str:
    """A line for each size, density, link and number of GPUs: what auto picks, the waiting ring alone, and the best."""
    lines = [
        "One call of the layer. m: modelled, on recorded masks; M: measured, on random inputs of nearly the same density.",
        "A star: a link with its nominal bandwidth, which was not measured. Of auto the best exchange on its degrees, for a",
        "run without guidance; with guidance each half is a run on half as many GPUs.",
        "",
        "| tokens | density | link | GPUs | auto | ms m | efficiency m | ρ m | best | ms m | efficiency m | M |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def what(one: Simulated) -> tuple[int, float, str, int]:
        return one.size.tokens, -one.density, one.link, one.mesh.ranks

    for key, same in groupby(sorted(found, key=what), key=what):
        every = list(same)
        picked = [one for one in every if one.auto]
        best = min(every, key=lambda one: one.ms)
        auto = min(picked, key=lambda one: one.ms) if picked else None
        own = "finer than the recording | – | – | –" if auto is None else _told(auto) + f" | {auto.rho:.3f}"
        star = "*" if best.assumed else ""
        lines.append(
            f"| {key[0]} | {-key[1]:.2f} | {key[2]}{star} | {key[3]} | {own} | {_told(best)} | {_measured(best, checked)} |"
        )
    return "\n".join(lines) + "\n"


def _told(one: Simulated) -> str:
    return f"{one.mesh} | {one.ms:.2f} | {one.efficiency:.2f}"


def _measured(one: Simulated, checked: Sequence[Checked]) -> str:
    """Of one and two GPUs over nvlink: each mesh that was measured."""
    if one.link != "nvlink":
        return "–"
    rows = [c.row for c in checked if c.row["gpus"] == one.mesh.ranks and _alike(one, c)]
    told = {f"U{row['ulysses']}×R{row['ring']} {row['ms_median']:.2f}" for row in rows}
    return ", ".join(sorted(told)) or "–"


def _alike(one: Simulated, checked: Checked) -> bool:
    row = checked.row
    same = row["sequence"] == one.size.tokens and row["heads"] == one.size.heads
    return bool(same and row["density"] < 1 and abs(row["density"] - one.density) < 0.02)


def balance_table(recordings: Sequence[RecordedMasks], costs: Costs) -> str:
    """Where heads do not divide: whole heads as they go out, rings, and the least that dealing out queries could take."""
    cluster = Cluster(costs.nvlink, costs.nvlink)
    lines = [
        "Modelled, nvlink. ρ: the slowest rank's attention over the mean, on recorded masks. With queries of the heads",
        "that are left over dealt out, all ranks attend equally much, and each receives the keys and values of those heads",
        "besides; the line tells the time if all of that is hidden, and if none of it is.",
        "",
        "| tokens | heads | density | ranks | mesh | ms | ρ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, heads, ranks in _UNEVEN:
        size = LayerSize(tokens, heads)
        for masks in recordings:
            layers = [Layer(size, costs, masks.dense(n)) for n in range(len(masks.places))]
            density = float(np.mean([masks.dense(n).mean() for n in range(len(layers))]))
            for count in ranks:
                start = f"| {tokens} | {heads} | {density:.2f} | {count} |"
                uneven = _mean_ms(layers, Mesh(count), cluster)
                for mesh in _meshes(count):
                    rho = float(np.mean([layer.imbalance(mesh) for layer in layers]))
                    lines.append(f"{start} {mesh} | {_mean_ms(layers, mesh, cluster):.2f} | {rho:.3f} |")
                saved, sent = _dealt_out(layers, count, cluster)
                lines.append(
                    f"{start} U{count}, queries dealt out | {uneven - saved:.2f} to {uneven - saved + sent:.2f} | 1.000 |"
                )
    lines += [
        "",
        "| ring of | tokens | density | ρ, as it waits | ρ, with room for all shards | ρ, with a barrier at every hop |",
        "| --- " * 6 + "|",
    ]
    size = LayerSize(*_UNEVEN[0][:2])
    for masks, ring in product(recordings, _RINGS):
        layers = [Layer(size, costs, masks.dense(n)) for n in range(len(masks.places))]
        density = float(np.mean([masks.dense(n).mean() for n in range(len(layers))]))
        waiting, with_room = (
            float(np.mean([layer.imbalance(Mesh(1, ring, buffers=held)) for layer in layers]))
            for held in (None, ring - 1)
        )
        barrier = float(np.mean([layer.barrier_imbalance(ring) for layer in layers]))
        lines.append(f"| {ring} | {size.tokens} | {density:.2f} | {waiting:.3f} | {with_room:.3f} | {barrier:.3f} |")
    return "\n".join(lines) + "\n"


def _meshes(count: int) -> list[Mesh]:
    degrees = [(u, count // u) for u in range(count, 0, -1) if count % u == 0]
    return [Mesh(u, r, exchange) for u, r in degrees for exchange in (EXCHANGES if r > 1 else EXCHANGES[:1])]


def _mean_ms(layers: Sequence[Layer], mesh: Mesh, cluster: Cluster) -> float:
    return float(np.mean([layer.replay(mesh, cluster).ms for layer in layers]))


def _dealt_out(layers: Sequence[Layer], count: int, cluster: Cluster) -> tuple[float, float]:
    """Milliseconds of attention that equal work saves, and of the keys and values that it sends besides."""
    size = layers[0].size
    kernels = [layer.replay(Mesh(count), cluster).kernels for layer in layers]
    saved = float(np.mean([of_ranks.max() - of_ranks.mean() for of_ranks in kernels]))
    nbytes = 2 * size.token_bytes(size.tokens, size.heads % count) * (count - 1) / count
    return saved, cluster.inside.ms(nbytes)


def draw_scaling(found: Sequence[Simulated], checked: Sequence[Checked], folder: Path) -> list[Path]:
    """For each size, how many times as fast as one GPU: what auto picks, modelled, as dashed lines; measured as dots.

    Raises:
        ValueError: no matplotlib.
    """
    from matplotlib.figure import Figure

    from launch.benchmarks.plot import prepare, save

    prepare(folder)
    drawn = []
    for tokens in sorted({one.size.tokens for one in found}):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.subplots()
        own = [one for one in found if one.size.tokens == tokens and one.auto]
        most = max((one.mesh.ranks for one in own), default=1)
        series = sorted({(one.link, one.density) for one in own})
        for (link, density), marker in zip(series, "osD^vPX*" * len(series), strict=False):
            best: dict[int, float] = {}
            for one in own:
                if (one.link, one.density) == (link, density):
                    best[one.mesh.ranks] = max(best.get(one.mesh.ranks, 0.0), one.efficiency * one.mesh.ranks)
            counts = sorted(best)
            axes.plot(
                counts, [best[n] for n in counts], marker=marker, fillstyle="none", linestyle="--", linewidth=1,
                label=f"modelled, {link}{'' if link == 'nvlink' else ' (nominal)'}, density {density:.2f}",
            )  # fmt: skip
        dots = [
            (row["gpus"], row["parallel_efficiency"] * row["gpus"], row["density"])
            for row in (one.row for one in checked)
            if row["sequence"] == tokens and row["gpus"] > 1 and row.get("parallel_efficiency") and row["density"] < 0.4
        ]
        if dots:
            axes.plot([n for n, _, _ in dots], [s for _, s, _ in dots], "k.", markersize=7, label="measured, nvlink")
        axes.plot([1, most], [1, most], color="black", linewidth=1, label="ideal")
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("GPUs, 8 a node, InfiniBand between nodes (nominal)")
        axes.set_ylabel("times as fast as one GPU")
        axes.set_title(
            f"attention layer, {tokens} tokens, mesh auto without guidance: modelled and measured", fontsize=10
        )
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
        drawn.append(save(figure, folder / f"simulated_{tokens}.png"))
    return drawn
