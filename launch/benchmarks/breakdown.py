"""Where the time of one layer goes: its parts, each timed alone on the inputs that it has within the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from launch.benchmarks.timing import Timer
from sp_sparse import SparseAttention, VideoGrid
from sp_sparse.mask import BlockMask
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.remainder.attend import add_remainder
from sp_sparse.selection.summaries import block_means, block_scores
from sp_sparse.selection.topk import select_topk


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of the parts of a sparse call; the sum is below that of the layer by communication and merging.

    Each part takes all heads of the rank at once, where the layer under Ulysses takes them in chunks.

    Attributes:
        kernel: attention under the mask, over every shard of the ring.
        means: block means of queries and keys.
        scores: their dot products.
        topk: selection of the blocks.
        split: cutting the mask into those of the ring's shards; on a mesh without a ring it is no part of the layer.
        remainder: what stands for the blocks that are left out, the ring's exchange of it, and its merging.
    """

    kernel: float
    means: float
    scores: float
    topk: float
    split: float
    remainder: float

    def to_json(self, layer: float, ring: bool) -> dict[str, float]:
        """With the rest of the layer's time, and all but the kernel's as a percentage of it."""
        split = self.split if ring else 0.0
        times = {
            "ms_kernel": self.kernel,
            "ms_means": self.means,
            "ms_scores": self.scores,
            "ms_topk": self.topk,
            "ms_split": split,
            "ms_remainder": self.remainder,
            "ms_other": layer - self.kernel - self.means - self.scores - self.topk - split - self.remainder,
            "overhead_percent": 100 * (layer - self.kernel) / self.kernel,
        }
        if not ring:
            times["ms_split_in_two"] = self.split
        return {name: round(value, 4) for name, value in times.items()}


def measure_breakdown(
    layer: SparseAttention, inputs: tuple[Tensor, Tensor, Tensor], grid: VideoGrid, density: float, timer: Timer
) -> Breakdown:
    """Time the parts on this rank's share of the mesh of `layer`; the slowest rank counts. A collective call."""
    query_block, key_block = block_size = layer.config.block_size
    q, k, v, shards, _ = layer.strategy.pre_attention(*inputs, layer.shards(grid))
    lengths = q.shape[1], shards.sequence_length
    static = layer._static_plans.blocks(grid, shards.range_of(layer.mesh.ring_rank), q.device)
    query_means = block_means(q, query_block)
    key_means = layer.strategy.gather_blocks(block_means(k, key_block), shards, key_block)
    scores = block_scores(query_means, key_means)
    mask = select_topk(scores, static, density, block_size, *lengths)
    ring = layer.mesh.ring_degree > 1
    edges = shards.edges if ring else _halves(shards.sequence_length, key_block)
    hops = _hops(mask, k, v, shards, layer.mesh.ring_rank) if ring else [(k, v, mask)]
    kernel, scale = layer.kernel_for(q.device, q.dtype), layer.head_dim**-0.5

    def attend(_: int) -> None:
        for hop_key, hop_value, hop_mask in hops:
            kernel(q, hop_key, hop_value, hop_mask, scale)

    def remain(_: int) -> None:
        means = layer._left_out(k, v, shards)
        if means is not None:
            # Merged again and again into the same output: its values do not matter here.
            add_remainder(out, lse, q, means, mask, scale)

    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return Breakdown(
        kernel=timer(attend).median,
        means=timer(lambda _: (block_means(q, query_block), block_means(k, key_block))).median,
        scores=timer(lambda _: block_scores(query_means, key_means)).median,
        topk=timer(lambda _: select_topk(scores, static, density, block_size, *lengths)).median,
        split=timer(lambda _: mask.split_keys(edges)).median,
        remainder=0.0 if layer.config.remainder == "drop" else timer(remain).median,
    )


def _hops(
    mask: BlockMask, key: Tensor, value: Tensor, shards: SequenceShards, ring_rank: int
) -> list[tuple[Tensor, Tensor, BlockMask]]:
    """What the kernel gets in each hop; the other ranks' keys and values are random here, which takes the same time."""
    hops = []
    for owner, (length, part) in enumerate(zip(shards.lengths, mask.split_keys(shards.edges), strict=True)):
        pair = key, value
        if owner != ring_rank:
            shape = (2, key.shape[0], length, *key.shape[2:])
            other = torch.randn(shape, dtype=key.dtype, device=key.device)
            pair = other[0], other[1]
        if length:
            hops.append((*pair, part))
    return hops


def _halves(length: int, block: int) -> tuple[int, int, int]:
    return 0, length // 2 // block * block, length
