"""Every mesh of so many GPUs, modelled, and which of them `--mesh auto` picks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.benchmarks.simulation.costs import Costs
from launch.benchmarks.simulation.replay import EXCHANGES, Cluster, Layer, Mesh
from launch.benchmarks.simulation.work import LayerSize
from sp_sparse.generate.auto_mesh import Situation, choose_mesh
from sp_sparse.generate.recorded_masks import RecordedMasks

# Recorded blocks of a ring shard: a finer cut says little of the masks that were recorded.
_LEAST_BLOCKS = 4


@dataclass(frozen=True)
class Scenario:
    """One layer on one kind of machine."""

    size: LayerSize
    cluster: Cluster
    masks: RecordedMasks
    costs: Costs

    def layers(self) -> list[Layer]:
        """One for each recorded place."""
        return [Layer(self.size, self.costs, self.masks.dense(n)) for n in range(len(self.masks.places))]

    @property
    def most_ring(self) -> int:
        return self.masks.key_blocks // _LEAST_BLOCKS


@dataclass(frozen=True)
class Simulated:
    """A modelled mesh.

    Attributes:
        density: of the recorded masks.
        ms: of one call, the mean over recorded places.
        efficiency: T₁ / (N · T_N), both modelled.
        rho: the slowest rank's attention over the mean, waiting for other ranks included; the mean over recorded places.
        worst_rho: of the worst of them.
        auto: whether `--mesh auto` picks these degrees where guidance is off.
        link: within a node.
        assumed: whether a link has its nominal bandwidth instead of a measured one.
    """

    size: LayerSize
    density: float
    link: str
    mesh: Mesh
    ms: float
    efficiency: float
    rho: float
    worst_rho: float
    auto: bool
    assumed: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "what": "simulated",
            "gpus": self.mesh.ranks,
            "ulysses": self.mesh.ulysses,
            "ring": self.mesh.ring,
            "kv_exchange": self.mesh.exchange if self.mesh.ring > 1 else None,
            "sequence": self.size.tokens,
            "heads": self.size.heads,
            "density": round(self.density, 4),
            "link": self.link,
            "link_assumed": self.assumed,
            "ms_modelled": round(self.ms, 4),
            "efficiency_modelled": round(self.efficiency, 4),
            "rho": round(self.rho, 4),
            "worst_rho": round(self.worst_rho, 4),
            "auto": self.auto,
        }


def simulate(scenario: Scenario, gpus: Sequence[int]) -> Iterator[Simulated]:
    """Every mesh of each number of GPUs whose ring the recording is fine enough for."""
    layers = scenario.layers()
    density = float(np.mean([scenario.masks.dense(n).mean() for n in range(len(layers))]))
    one = float(np.mean([layer.replay(Mesh(1), scenario.cluster).ms for layer in layers]))
    crossing = scenario.cluster
    for count in gpus:
        picked = auto_mesh(count, scenario)
        assumed = count > 1 and not (crossing.inside.measured and count <= crossing.node)
        for mesh in meshes_of(count, scenario):
            times = [layer.replay(mesh, crossing).ms for layer in layers]
            rhos = [layer.imbalance(mesh) for layer in layers]
            ms = float(np.mean(times))
            yield Simulated(
                scenario.size,
                density,
                crossing.inside.name,
                mesh,
                ms,
                one / count / ms,
                float(np.mean(rhos)),
                max(rhos),
                (mesh.ulysses, mesh.ring) == picked,
                assumed,
            )


def meshes_of(count: int, scenario: Scenario) -> list[Mesh]:
    found = []
    for ulysses in (u for u in range(1, min(count, scenario.size.heads) + 1) if count % u == 0):
        ring = count // ulysses
        if ring <= scenario.most_ring:
            found += [Mesh(ulysses, ring, exchange) for exchange in (EXCHANGES if ring > 1 else EXCHANGES[:1])]
    return found


def auto_mesh(count: int, scenario: Scenario) -> tuple[int, int]:
    """(Ulysses, ring) degree that `--mesh auto` picks without guidance; with it, that of half as many GPUs for each half."""
    nodes = tuple(f"node {rank // scenario.cluster.node}" for rank in range(count))
    choice = choose_mesh(Situation(nodes, scenario.size.heads, scenario.size.blocks, guided=False))
    return choice.ulysses_degree, choice.ring_degree
