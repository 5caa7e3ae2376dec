"""What pruning keys and values would save, modelled: `python -m launch.prototypes.pruned_model`, as Markdown; needs no GPU.

On recorded masks, the share of the others' key blocks that ring shards need, and the modelled milliseconds of one layer with
ring · all-gathered · pruned keys, then Ulysses on as many ranks, over NVLink as measured, nominal PCIe, and a slow link.
That pruning makes the host wait for the device is left out, so that what it saves is at most this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from launch.benchmarks.simulation.costs import Link, fit, read_rows
from launch.benchmarks.simulation.replay import Cluster, Layer, Mesh
from launch.benchmarks.simulation.work import LayerSize
from sp_sparse.generate.recorded_masks import RecordedMasks

_RESULTS = Path(__file__).resolve().parents[2] / "docs/benchmarks"
_MASKS = tuple(_RESULTS / f"2026-11-26_cpu_simulate/mini_{density}.npz" for density in (0.3, 0.1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", type=Path, default=_MASKS, help="files of generate --output-masks")
    parser.add_argument("--costs", type=Path, default=_RESULTS / "2026-11-25_h200x2_scaling")
    parser.add_argument("--tokens", nargs="+", type=int, default=(75600,))
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--rings", nargs="+", type=int, default=(2, 4, 8))
    parser.add_argument("--slow-gb-per-s", type=float, default=15.0, help="of the slow link, one direction")
    arguments = parser.parse_args(argv)
    costs = fit(read_rows(arguments.costs))
    links = (costs.nvlink, costs.link("pcie"), replace(costs.nvlink, name="slow", gb_per_s=arguments.slow_gb_per_s))
    names = [f"{link.name}, {link.gb_per_s:.0f} GB/s" for link in links]
    print("| tokens | density | ring of | needed: mean, least to most | " + " | ".join(names) + " |")
    print("| --- " * (4 + len(links)) + "|")
    for tokens in arguments.tokens:
        for masks in map(RecordedMasks.load, arguments.masks):
            dense = [masks.dense(number) for number in range(len(masks.places))]
            layers = [Layer(LayerSize(tokens, arguments.heads), costs, mask) for mask in dense]
            density = float(np.mean([mask.mean() for mask in dense]))
            for ring in arguments.rings:
                shares = [needed_of_others(layer, ring) for layer in layers]
                needed = f"{np.mean(shares):.0%}, {min(shares):.0%} to {max(shares):.0%}"
                cells = [modelled(layers, ring, link) for link in links]
                print(f"| {tokens} | {density:.2f} | {ring} | {needed} | {' | '.join(cells)} |", flush=True)
    return 0


def needed_of_others(layer: Layer, ring: int) -> float:
    """Of the keys of other shards, those that any query of a shard attends; the mean over heads and shards."""
    return float(layer.needed(ring).mean(0)[~np.eye(ring, dtype=np.bool_)].mean())


def modelled(layers: Sequence[Layer], ring: int, link: Link) -> str:
    """Milliseconds with each exchange, then under Ulysses: the mean over the layers."""
    cluster = Cluster(link, link, ring)
    meshes = [*(Mesh(1, ring, exchange) for exchange in ("ring", "all_gather", "pruned")), Mesh(ring)]
    return " · ".join(f"{np.mean([layer.replay(mesh, cluster).ms for layer in layers]):.1f}" for mesh in meshes)


if __name__ == "__main__":
    sys.exit(main())
