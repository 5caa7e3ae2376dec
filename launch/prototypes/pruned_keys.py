"""Keys and values pruned to blocks that masks choose: ring ranks tell one another which they attend, and send those alone.

As all-gathered keys otherwise: the own shard is attended while the others' blocks are on their way, then those in one call.
Messages have sizes that the host must know, so every call waits once for the device, with the mask and the others' lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import Part, SequenceParallelStrategy


class Aside:
    """A stream of high priority for exchanges; on CPUs they run in place.

    Unlike `SideStream` it waits for the current stream only where it is told to: what is sent after the host has read the
    lists must not wait for the attention of the own shard, which is queued by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def follow(self) -> None:
        """Wait for all that the current stream holds by now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def run(self) -> AbstractContextManager[None]:
        """Queue work here; what it allocates is this stream's, and must not be used elsewhere."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self) -> None:
        """Let the current stream wait for all that is queued here."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@dataclass(frozen=True, eq=False)
class PrunedKVStrategy(SequenceParallelStrategy):
    """As `SequenceParallelStrategy`, but ring ranks send one another the key blocks that the receiver's mask chooses.

    Attributes:
        aside: where they travel; one for all calls.
    """

    aside: Aside = field(kw_only=True)

    def parts(
        self, key: Tensor, value: Tensor, mask: BlockMask | None, metadata: SequenceShards, group: ProcessGroup
    ) -> tuple[int, Iterator[Part]]:
        """The own shard, then the chosen blocks of all others in one.

        Raises:
            ValueError: no mask.
        """
        if mask is None:
            raise ValueError("dense attention chooses every key block, so none can be pruned; use another exchange")
        own = metadata.lengths[self.mesh.ring_rank] > 0
        return 1 + own, pruned_keys(key, value, mask, metadata.edges, group, self.aside)


@dataclass(frozen=True)
class Lists:
    """Which key blocks go where; uint8 `[R, B * H, blocks of the longest shard]`, 1 for a block that goes.

    Attributes:
        asked: of each rank's shard, what this rank attends.
        wanted: of this rank's shard, what each rank attends.
    """

    asked: Tensor
    wanted: Tensor

    @classmethod
    def exchange(cls, mask: BlockMask, edges: Sequence[int], group: ProcessGroup, aside: Aside) -> Lists:
        """Tell the others, and hear of them. A collective call.

        Args:
            mask: over this rank's query blocks and all key blocks; this rank's own, if chosen, are asked of itself.
        """
        needed = mask.to_dense().any(2).flatten(0, 1)
        cuts = [num_blocks(edge, mask.block_size[1]) for edge in edges]
        most = max(last - first for first, last in pairwise(cuts))
        asked = needed.new_zeros(len(cuts) - 1, needed.shape[0], most, dtype=torch.uint8)
        for rank, (first, last) in enumerate(pairwise(cuts)):
            asked[rank, :, : last - first] = needed[:, first:last]
        wanted = torch.empty_like(asked)
        aside.follow()
        with aside.run():
            dist.all_to_all_single(wanted, asked, group=group)
        return cls(asked, wanted)

    def counts(self, aside: Aside) -> tuple[list[int], list[int]]:
        """Blocks that come from each rank, and that go to each. The host waits for `aside`, and so for the mask."""
        with aside.run():
            received, sent = torch.stack([x.sum((1, 2), dtype=torch.int32) for x in (self.asked, self.wanted)]).tolist()
        return received, sent


def pruned_keys(
    key: Tensor, value: Tensor, mask: BlockMask, edges: Sequence[int], group: ProcessGroup, aside: Aside
) -> Iterator[Part]:
    """Yield (key, value, mask): the own shard while the others' blocks are on their way, then everything under the rest of
    the mask. Keys and values that the rest does not choose are uninitialised.

    Args:
        key, value: this rank's shard, `[B, S_rank, H, D]`; `D` elements take a multiple of 8 bytes.
        mask: over this rank's query blocks and all key blocks.
        edges: first token of each rank's shard, then the end of the last.
        group: the ring group.
        aside: where they travel.
    """
    rank = dist.get_rank(group)
    first, last = edges[rank], edges[rank + 1]
    shard = key.contiguous(), value.contiguous()
    own, others = mask.cut_keys(first, last)
    batch, _, heads, head_dim = key.shape
    everything = [x.new_empty(batch, edges[-1], heads, head_dim) for x in shard]
    # By fills: a copy from the host would wait for the device.
    begins = torch.cat([torch.full((1,), edge, device=key.device) for edge in edges[:-1]])
    lists = Lists.exchange(others, edges, group, aside)
    try:
        if first < last:
            yield key, value, own
        received, sent = lists.counts(aside)
        with aside.run():
            leaving = _token_rows(lists.wanted, sum(sent), torch.zeros_like(begins), shard[0], mask.block_size[1])
            coming = _token_rows(lists.asked, sum(received), begins, everything[0], mask.block_size[1])
            tokens_in, tokens_out = ([count * mask.block_size[1] for count in counts] for counts in (received, sent))
            for source, target in zip(shard, everything, strict=True):
                packed = _rows(source).index_select(0, leaving)
                arriving = packed.new_empty(coming.shape[0], packed.shape[1])
                dist.all_to_all_single(arriving, packed, tokens_in, tokens_out, group=group)
                _rows(target).index_copy_(0, coming, arriving)
    finally:
        aside.join()  # left early, too: buffers must not be handed on while blocks still arrive
    yield everything[0], everything[1], others


def _rows(x: Tensor) -> Tensor:
    """`[B, S, H, D]` as rows of one token and head each, in elements of 8 bytes."""
    return x.flatten(0, 2).view(torch.int64)


def _token_rows(goes: Tensor, count: int, begins: Tensor, holder: Tensor, block: int) -> Tensor:
    """Which rows of `_rows(holder)` hold the tokens of the blocks that go: by rank, batch, head and block.

    Args:
        goes: as in `Lists`.
        count: how many go.
        begins: for each rank, the token of `holder` at which its blocks begin.
        holder: `[B, S, H, D]`. Of a last block that ends short the last token comes several times, on both sides alike.
    """
    _, length, heads, _ = holder.shape
    # Stable: those that go come first, in order.
    chosen = goes.flatten().argsort(descending=True, stable=True)[:count]
    rank, head = chosen // goes[0].numel(), chosen // goes.shape[2] % goes.shape[1]
    tokens = (begins[rank] + chosen % goes.shape[2] * block).unsqueeze(1) + torch.arange(block, device=goes.device)
    tokens.clamp_(max=length - 1)
    return ((head // heads * length).unsqueeze(1) + tokens).mul_(heads).add_((head % heads).unsqueeze(1)).flatten()
