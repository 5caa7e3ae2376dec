"""What measurements of one layer run on: the layer, and random tensors in which neighbouring tokens are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from launch.benchmarks.arguments import LayerArguments, Run
from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttention, SparseAttentionConfig, VideoGrid
from sp_sparse.generate.ranks import Ranks
from sp_sparse.parallel.shards import SequenceShards

Inputs = tuple[Tensor, Tensor, Tensor]

_ALIKE = 100


def shard_inputs(
    arguments: LayerArguments, mesh: SequenceParallelMesh, grid: VideoGrid, ranks: Ranks, number: int = 0
) -> Inputs:
    """This rank's shard; ranks need not agree on the rest of the sequence. Other numbers give other values."""
    block = math.lcm(*arguments.block_size)
    cut = SequenceShards.aligned(grid.num_tokens, block, mesh.ulysses_degree, mesh.ring_degree)
    first, last = cut.range_of(mesh.sequence_rank)
    shape = (1, last - first, arguments.heads, arguments.head_dim)
    return random_inputs(shape, getattr(torch, arguments.dtype), ranks.device, ranks.rank + number)


def make_layer(
    arguments: LayerArguments,
    mesh: SequenceParallelMesh,
    run: Run,
    kv_exchange: str = "ring",
    recorder: AttentionRecorder | None = None,
) -> SparseAttention:
    """A layer that keeps this share of the blocks in every step. A collective call."""
    config = SparseAttentionConfig(
        backend=run.backend,
        topk=run.density,
        schedule="constant",
        remainder=run.remainder,
        token_order=arguments.token_order,
        block_size=arguments.block_size,
        kv_exchange=kv_exchange,
    )
    return SparseAttention(
        config,
        mesh,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        recorder=recorder,
        check_calls=False,  # a transformer compares once a forward, not in each layer
    )


def random_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value of `shape` `[B, S, H, D]`."""
    batch, length, heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(seed)

    def noise(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=dtype, device=device)

    common = noise(-(-length // _ALIKE)).repeat_interleave(_ALIKE, 1)[:, :length]
    return noise(length) + common, noise(length) + common, noise(length)
