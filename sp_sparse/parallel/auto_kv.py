"""A ring whose exchange is chosen by what all ranks know, anew for each size: `kv_exchange=auto`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask
from sp_sparse.parallel.all_gather_kv import AllGatherKVStrategy
from sp_sparse.parallel.kv_exchange import KVExchange, KVExchangePlan
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import Part, SequenceParallelStrategy


@dataclass(frozen=True, eq=False)
class AutoKVStrategy(AllGatherKVStrategy):
    """As `SequenceParallelStrategy` or as `AllGatherKVStrategy`, as the plan has it.

    Attributes:
        plan: must have met for the device of the tensors.
        num_heads: of the whole layer.
    """

    plan: KVExchangePlan = field(kw_only=True)
    num_heads: int = field(kw_only=True)

    def parts(
        self, key: Tensor, value: Tensor, mask: BlockMask | None, metadata: SequenceShards, group: ProcessGroup
    ) -> tuple[int, Iterator[Part]]:
        chosen = self.kv_exchange(key, mask is None, metadata)
        way = AllGatherKVStrategy if chosen is not None and chosen.name == "all_gather" else SequenceParallelStrategy
        return way.parts(self, key, value, mask, metadata, group)

    def kv_exchange(self, like: Tensor, dense: bool, metadata: SequenceShards) -> KVExchange | None:
        if self.mesh.ring_group is None:
            return None
        # Not of this rank's own heads and tokens, of which another may have more.
        batch, _, _, head_dim = like.shape
        heads, tokens = max(self.heads(self.num_heads)), max(metadata.lengths)
        shard_bytes = 2 * batch * tokens * heads * head_dim * like.element_size()
        return self.plan.choose(like.device, shard_bytes, dense)
