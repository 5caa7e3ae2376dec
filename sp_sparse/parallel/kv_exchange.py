"""`kv_exchange=auto`: how ring ranks come by the others' keys and values, chosen from what all ranks of the mesh know.

The rule is measured on two GPUs of one node and modelled for the rest (docs/parallelism.md). Which ranks share a node is
looked at, and not what links there are between and within nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from sp_sparse.parallel.agreement import every_value, this_node
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.ring import ring_buffers

# Of the smallest device's memory: what all-gathered keys may hold beyond what a ring holds. A judgement, not measured.
_MOST_BEYOND_RING = 0.02


class KVExchange(NamedTuple):
    """How keys and values go over a ring, and why so."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


AS_ASKED = "as asked"


@dataclass(frozen=True)
class RingFacts:
    """What an exchange is chosen by; the same on all ranks that gathered it.

    Attributes:
        rings: of each ring of the mesh, the node of each of its ranks.
        memory: bytes of the smallest device; None where a rank computes on the CPU.
    """

    rings: tuple[tuple[str, ...], ...]
    memory: int | None

    @classmethod
    def gather(cls, mesh: SequenceParallelMesh, device: torch.device, groups: Sequence[ProcessGroup]) -> RingFacts:
        """Of all ranks of `groups`, which are those of the mesh or those that share a sequence. A collective call."""
        own = (mesh.cfg_rank, mesh.ulysses_rank, mesh.ring_rank), this_node(), _memory(device)
        told = sorted(every_value(own, groups).values(), key=lambda of_rank: of_rank[0])
        rings: dict[tuple[int, int], tuple[str, ...]] = {}
        for (cfg_rank, ulysses_rank, _), node, _ in told:
            rings[cfg_rank, ulysses_rank] = (*rings.get((cfg_rank, ulysses_rank), ()), node)
        memories = [memory for _, _, memory in told if memory is not None]
        return cls(tuple(rings.values()), min(memories) if len(memories) == len(told) else None)

    @property
    def ranks(self) -> int:
        """Of a ring."""
        return len(self.rings[0])

    @property
    def crosses(self) -> bool:
        """Whether any ring has ranks on several nodes."""
        return any(len(set(ring)) > 1 for ring in self.rings)

    @property
    def fewest_neighbours(self) -> int:
        """Ranks of a ring on one node: the fewest of any node and ring."""
        return min(min(Counter(ring).values()) for ring in self.rings)


def choose_kv_exchange(facts: RingFacts, shard_bytes: int, dense: bool) -> KVExchange:
    """All-gathered keys where they send less between nodes and fit; else a ring.

    Between nodes every hop of a ring waits for the slow link, `R - 1` times a shard. All-gathered keys send a shard over it
    once for each rank of another node, so they send less where every node has several ranks of the ring.

    Args:
        shard_bytes: keys and values of the longest shard, in bytes, on the rank with the most heads.
        dense: no mask: a ring hides its hops, and gathered keys, attended in one call, hide nothing.
    """
    ranks, neighbours = facts.ranks, facts.fewest_neighbours
    if dense:
        return KVExchange("ring", "dense attention hides the hops of a ring, and nothing of gathering keys")
    if ranks == 2:
        return KVExchange("ring", "between two ranks both take as long (measured), and a ring holds less")
    if not facts.crosses:
        return KVExchange("ring", "within a node neither is always faster (modelled), and a ring holds less")
    if neighbours < 2:
        return KVExchange("ring", "a rank is alone on its node, so that gathering keys sends no less between nodes")
    beyond = (ranks - ring_buffers(ranks)) * shard_bytes
    if facts.memory is not None and beyond > _MOST_BEYOND_RING * facts.memory:
        return KVExchange(
            "ring",
            f"gathered keys send less between nodes, but hold {_gib(beyond)} more than a ring, which is over "
            f"{_MOST_BEYOND_RING:.0%} of the smallest device's {_gib(facts.memory)}",
        )
    return KVExchange(
        "all_gather",
        f"{ranks - neighbours} shards go between nodes instead of {ranks - 1} hops that wait for that link (modelled)",
    )


class KVExchangePlan:
    """What `auto` chooses for the layers of a mesh: facts are gathered once a device, and choices follow from them."""

    def __init__(self) -> None:
        self._facts: dict[torch.device, RingFacts] = {}

    def meet(self, mesh: SequenceParallelMesh, device: torch.device, groups: Sequence[ProcessGroup]) -> None:
        """Gather the facts, the first time. A collective call of the ranks of `groups`."""
        if device not in self._facts:
            self._facts[device] = RingFacts.gather(mesh, device, groups)

    def choose(self, device: torch.device, shard_bytes: int, dense: bool) -> KVExchange:
        """As `choose_kv_exchange`, after `meet`; no collective."""
        return choose_kv_exchange(self._facts[device], shard_bytes, dense)


def _memory(device: torch.device) -> int | None:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
