"""Property-based: any grid, block size, head count, order and density gives the same masks and output on a mesh.

Rank 0 draws the examples and tells the other ranks, so that collectives stay in step; nothing is shrunk for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SequenceShards, SparseAttention, SparseAttentionConfig
from sp_sparse.config import REMAINDERS
from sp_sparse.video import TOKEN_ORDERS, VideoGrid
from tests.oracle import block_rows, expand, masked_attention, relative_error
from tests.ranks import run_ranks
from tests.remainder_oracle import attention_with_remainder

SIDES = st.integers(1, 9)


@st.composite
def configurations(draw: st.DrawFn) -> SparseAttentionConfig:
    keep_diagonal = draw(st.booleans())
    return SparseAttentionConfig(
        backend="reference",
        schedule="constant",
        topk=draw(st.floats(0.01, 0.9)),
        keep_diagonal=keep_diagonal,
        keep_first_frame=draw(st.booleans()),
        window=draw(st.integers(0, 2)) if keep_diagonal else 0,
        block_size=(draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from([8, 16, 32]))),
        token_order=draw(st.sampled_from(TOKEN_ORDERS)),
        kv_exchange=draw(st.sampled_from(["ring", "all_gather"])),
        remainder=draw(st.sampled_from(REMAINDERS)),
        selector=draw(st.sampled_from(["topk", "subblock", "window"] if keep_diagonal else ["topk", "subblock"])),
    )


@dataclass(frozen=True)
class Example:
    config: SparseAttentionConfig
    grid: VideoGrid
    heads: int
    batch: int
    equal_cut: bool
    seed: int


def _check(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    message: list[Example | None] = [None]
    if rank == 0:

        @settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=25,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            st.builds(
                Example,
                config=configurations(),
                grid=st.builds(VideoGrid, SIDES, SIDES, SIDES),
                heads=st.integers(ulysses, 7),
                batch=st.integers(1, 2),
                equal_cut=st.booleans(),
                seed=st.integers(0, 1000),
            )
        )
        def draw(example: Example) -> None:
            _tell([example])
            _same_on_the_mesh(example, mesh)

        draw()
        _tell([None])
        return
    while True:
        _tell(message)
        if message[0] is None:
            return
        _same_on_the_mesh(message[0], mesh)


def _tell(message: list[Example | None]) -> None:
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)


def _same_on_the_mesh(example: Example, mesh: SequenceParallelMesh) -> None:
    config, grid, heads, batch = example.config, example.grid, example.heads, example.batch
    generator = torch.Generator().manual_seed(example.seed)
    shape = (batch, grid.num_tokens, heads, 8)
    q, k, v = (torch.randn(shape, generator=generator) * scale for scale in (3.0, 2.0, 1.0))
    recorder = AttentionRecorder(keep_masks=True)
    alone = SparseAttention(config, SequenceParallelMesh(), num_heads=heads, head_dim=8, recorder=recorder)
    expected = alone(q, k, v, grid=grid)
    mask = recorder.masks[0][-1].to_dense()
    tokens = expand(mask, config.block_size, grid.num_tokens, grid.num_tokens)
    if config.remainder == "drop":
        exact, _ = masked_attention(q, k, v, tokens, 8**-0.5)
    else:
        linear = config.remainder == "linear"
        exact = attention_with_remainder(q, k, v, mask, config.block_size, 8**-0.5, linear)
    assert relative_error(expected, exact) < 5e-6

    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, mesh, num_heads=heads, head_dim=8, recorder=recorder)
    shards = SequenceShards.equal(grid.num_tokens, mesh.sequence_degree) if example.equal_cut else layer.shards(grid)
    first, last = shards.range_of(mesh.sequence_rank)
    padding = shards.lengths[mesh.sequence_rank] - (last - first)
    local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding)) for x in (q, k, v)]
    out = layer(local[0], local[1], local[2], grid=grid, shards=shards)[:, : last - first]
    difference = (out - exact[:, first:last]).square().mean().sqrt() if last > first else torch.zeros(())
    assert difference <= 5e-6 * exact.square().mean().sqrt()
    start, stop = shards.grouped(mesh.ulysses_degree).realigned(layer.strategy.block).range_of(mesh.ring_rank)
    counts = layer.strategy.heads(heads)
    first_head = sum(counts[: mesh.ulysses_rank])
    mine = mask[:, first_head : first_head + counts[mesh.ulysses_rank]]
    mine = mine[:, :, block_rows(start, stop, config.block_size[0])]
    assert torch.equal(recorder.masks[0][-1].to_dense(), mine)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_any_configuration_is_the_same_on_a_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check, ulysses, ring)
