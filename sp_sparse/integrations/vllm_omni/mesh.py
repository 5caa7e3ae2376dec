"""vllm-omni's sequence parallelism as ours: which of its ranks share a layer's queries, and who holds which tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group

from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards

# Who holds which tokens when a layer's implementation is called: every token, a ring shard, or own queries and all keys.
Place = Literal["local", "ring", "allgather"]

_MESH = "_sp_sparse_mesh"


@dataclass(frozen=True)
class OmniMesh:
    """The degrees of vllm-omni's sequence parallelism. Its ranks are numbered as ours, Ulysses fastest."""

    ulysses_degree: int = 1
    ring_degree: int = 1
    allgather_degree: int = 1

    @classmethod
    def of(cls, parallel_config: Any) -> OmniMesh:
        """From a `DiffusionParallelConfig`; None is one rank."""
        if parallel_config is None:
            return cls()
        return cls(parallel_config.ulysses_degree, parallel_config.ring_degree, parallel_config.allgather_degree)

    def __str__(self) -> str:
        names = {"ulysses": self.ulysses_degree, "ring": self.ring_degree, "all-gather-KV": self.allgather_degree}
        return " x ".join(f"{name} {degree}" for name, degree in names.items() if degree > 1) or "one rank"

    @property
    def place(self) -> Place:
        """How tokens are held in a sharded call."""
        if self.ring_degree > 1:
            return "ring"
        return "allgather" if self.allgather_degree > 1 else "local"

    @property
    def ranks(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree * self.allgather_degree

    def heads(self, num_heads: int) -> int:
        """Heads of a rank; vllm-omni pads those that do not divide (`ulysses_mode` advanced_uaa) or refuses them."""
        return math.ceil(num_heads / self.ulysses_degree)

    def padded(self, tokens: int) -> int:
        """Length of a sequence of `tokens` after vllm-omni has padded its end."""
        return math.ceil(tokens / self.ranks) * self.ranks

    def groups(self, place: Place) -> SequenceParallelMesh:
        """The ranks that share the queries of a call, the same object for every layer. vllm-omni has built its groups."""
        if place == "local":
            return SequenceParallelMesh()
        built: Any = get_sp_group()
        # Kept with vllm-omni's groups, whose lifetime it shares: layers of one mesh share its stream.
        if getattr(built, _MESH, None) is None:
            group = built.ring_group if place == "ring" else built.allgather_group
            setattr(built, _MESH, SequenceParallelMesh(ring_degree=dist.get_world_size(group), ring_group=group))
        mesh: SequenceParallelMesh = getattr(built, _MESH)
        return mesh

    def shards(self, place: Place, tokens: int) -> SequenceShards:
        """The cut of `tokens` over those ranks: vllm-omni's, equal shares with padding at the end."""
        if place == "local":
            return SequenceShards((tokens,))
        return SequenceShards.equal(tokens, self.ranks).grouped(self.ulysses_degree)
