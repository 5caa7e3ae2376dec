"""The model against what was measured on one and two GPUs: the error of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launch.benchmarks.inputs import random_inputs
from launch.benchmarks.results import Row
from launch.benchmarks.simulation.costs import KERNEL, Costs, size_of
from launch.benchmarks.simulation.replay import Cluster, Layer, Mesh
from launch.benchmarks.simulation.work import LayerSize
from sp_sparse.selection.static import StaticBlocks
from sp_sparse.selection.summaries import block_means, block_scores
from sp_sparse.selection.topk import select_topk

# What is asked of the model.
WITHIN = 0.07


@dataclass(frozen=True)
class Checked:
    """A measured layer beside the modelled one.

    Attributes:
        row: as it was measured.
        ms: modelled.
    """

    row: Row
    ms: float

    @property
    def error(self) -> float:
        """Of the model, relative to what was measured."""
        return self.ms / float(self.row["ms_median"]) - 1

    @property
    def met(self) -> bool:
        return abs(self.error) <= WITHIN


def check(rows: Sequence[Row], costs: Costs) -> list[Checked]:
    """Every measured layer that the model knows: its own sparse kernel and the dense one, on one host with nvlink."""
    cluster = Cluster(costs.nvlink, costs.nvlink)
    layers: dict[tuple[LayerSize, float], Layer] = {}
    found = []
    for row in rows:
        dense = row["kernel"] == "dense"
        if row["what"] != "attention" or row.get("implementation") != "layer" or not (dense or row["kernel"] == KERNEL):
            continue
        if row.get("remainder", "drop") != "drop":
            continue
        what = size_of(row), row["density_asked"]
        if what not in layers:
            layers[what] = Layer(what[0], costs, None if dense else benchmark_mask(*what))
        mesh = Mesh(row["ulysses"], row["ring"], row.get("kv_exchange", "ring"))
        found.append(Checked(row, layers[what].replay(mesh, cluster).ms))
    return found


def benchmark_mask(size: LayerSize, density: float) -> NDArray[np.bool_]:
    """One head's mask of `benchmark.py attention`, `[1, Nq, Nk]`; its heads are all alike."""
    query, key, _ = random_inputs((1, size.tokens, 1, size.head_dim), torch.float32, torch.device("cpu"), 0)
    scores = block_scores(block_means(query, size.block), block_means(key, size.block))
    static = StaticBlocks.of(np.eye(size.blocks, dtype=np.bool_), query.device)
    mask = select_topk(scores, static, density, (size.block, size.block), size.tokens, size.tokens)
    dense: NDArray[np.bool_] = mask.to_dense()[0].numpy()
    return dense


def check_table(checked: Sequence[Checked]) -> str:
    """A line a row, as Markdown; the efficiency of several GPUs, measured and modelled, beside it."""
    lines = [
        "| tokens | kernel | density | mesh | measured ms | modelled ms | error | within 7 % | efficiency measured "
        "| modelled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = {_same(one): one.ms for one in checked if one.row["gpus"] == 1}
    for one in checked:
        row = one.row
        mesh = f"U{row['ulysses']}×R{row['ring']}" + (f" {row['kv_exchange']}" if "kv_exchange" in row else "")
        lines.append(
            f"| {row['sequence']} | {row['kernel']} | {row['density']:.2f} | {mesh} | {row['ms_median']:.2f} | {one.ms:.2f} "
            f"| {one.error:+.1%} | {'yes' if one.met else 'no'} | {_efficiencies(one, alone)} |"
        )
    return "\n".join(lines) + "\n"


def _same(one: Checked) -> tuple[Any, ...]:
    """The layer, whatever the mesh."""
    return one.row["sequence"], one.row["kernel"], one.row["density"]


def _efficiencies(one: Checked, alone: dict[tuple[Any, ...], float]) -> str:
    measured = one.row.get("parallel_efficiency")
    if measured is None or _same(one) not in alone:
        return "– | –"
    return f"{measured:.2f} | {alone[_same(one)] / one.row['gpus'] / one.ms:.2f}"
