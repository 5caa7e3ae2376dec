"""The invariant: masks bit-identical and outputs equal for every mesh, against float64 dense attention under the mask."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sp_sparse import (
    AttentionRecorder,
    BlockMask,
    SequenceParallelMesh,
    SequenceShards,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.parallel.all_gather_kv import AllGatherKVStrategy
from sp_sparse.parallel.strategy import SequenceParallelStrategy
from sp_sparse.video import token_order
from tests.oracle import assert_close, block_rows, expand, masked_attention, relative_error
from tests.ranks import run_ranks
from tests.remainder_oracle import attention_with_remainder

MESHES = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2), (2, 4), (4, 2), (1, 8)]

BASE = SparseAttentionConfig(
    backend="reference", schedule="constant", topk=0.3, block_size=(16, 16), keep_diagonal=False
)

# (config, grid, heads, batch): lengths and head counts that do not divide, unequal blocks, one more batch entry.
CASES = {
    "plain": (BASE, VideoGrid(4, 8, 9), 4, 1),
    "ragged": (replace(BASE, topk=0.25, keep_diagonal=True), VideoGrid(5, 7, 9), 5, 2),
    "tile-first-frame": (
        replace(BASE, token_order="tile", keep_first_frame=True, keep_diagonal=True, topk=0.2),
        VideoGrid(6, 5, 9),
        5,
        1,
    ),
    "hilbert-window": (
        replace(BASE, token_order="hilbert", window=1, keep_diagonal=True, topk=0.15, block_size=(32, 8)),
        VideoGrid(5, 7, 9),
        4,
        1,
    ),
    "subblock": (replace(BASE, selector="subblock", keep_diagonal=True, topk=0.25), VideoGrid(5, 7, 9), 5, 2),
    "subblock-hilbert-first-frame": (
        replace(BASE, selector="subblock", token_order="hilbert", keep_first_frame=True, topk=0.2, block_size=(32, 8)),
        VideoGrid(6, 5, 9),
        4,
        1,
    ),
    "subblock-tile": (
        replace(BASE, selector="subblock", token_order="tile", block_size=(8, 24), topk=0.4),
        VideoGrid(3, 9, 11),
        5,
        1,
    ),
    "static-window": (replace(BASE, selector="window", window=2, keep_diagonal=True), VideoGrid(3, 11, 10), 7, 1),
    "wide-keys": (replace(BASE, block_size=(8, 24), topk=0.4), VideoGrid(3, 9, 11), 5, 1),
    "mean-of-the-rest": (replace(BASE, remainder="mean", topk=0.2), VideoGrid(5, 7, 9), 5, 2),
    "linear-rest-tile": (
        replace(BASE, remainder="linear", token_order="tile", keep_diagonal=True, block_size=(32, 8), topk=0.1),
        VideoGrid(6, 5, 9),
        5,
        1,
    ),
    "linear-rest-of-the-diagonal": (
        replace(BASE, remainder="linear", selector="window", keep_diagonal=True, block_size=(8, 24)),
        VideoGrid(3, 9, 11),
        4,
        1,
    ),
    "linear-rest-of-subblock": (
        replace(BASE, remainder="linear", selector="subblock", topk=0.15),
        VideoGrid(5, 7, 9),
        5,
        1,
    ),
    "mean-rest-of-subblock": (
        replace(BASE, remainder="mean", selector="subblock", token_order="hilbert", block_size=(8, 24), topk=0.2),
        VideoGrid(5, 7, 9),
        5,
        1,
    ),
    "one-block-each": (replace(BASE, topk=0.001, block_size=(16, 32)), VideoGrid(4, 9, 9), 4, 1),
}

# Each remainder with each selector that chooses by content, on degrees that divide nothing.
REMAINDER_CASES = ("mean-of-the-rest", "linear-rest-tile", "linear-rest-of-subblock", "mean-rest-of-subblock")
REMAINDER_MESHES = [(5, 1), (1, 5), (2, 3), (3, 2), (1, 6), (1, 7)]


def _inputs(grid: VideoGrid, heads: int, batch: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with structure (each frame its own direction), scaled so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(heads * 1000 + grid.num_tokens)
    shape = (batch, grid.num_tokens, heads, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    frame = torch.arange(grid.num_tokens) // (grid.height * grid.width)
    direction = torch.randn(grid.frames, heads, 16, generator=generator)
    q, k = (x * 1.5 + direction[(frame + shift) % grid.frames] for x, shift in ((q, 0), (k, 1)))
    permutation = torch.from_numpy(token_order(grid, order).copy())
    return q[:, permutation], k[:, permutation], v[:, permutation]


def _layer(
    config: SparseAttentionConfig, mesh: SequenceParallelMesh, heads: int
) -> tuple[SparseAttention, AttentionRecorder]:
    recorder = AttentionRecorder(keep_masks=True)
    return SparseAttention(config, mesh, num_heads=heads, head_dim=16, recorder=recorder), recorder


def _single(config: SparseAttentionConfig, grid: VideoGrid, heads: int, batch: int) -> tuple[Tensor, Tensor]:
    layer, recorder = _layer(config, SequenceParallelMesh(), heads)
    out = layer(*_inputs(grid, heads, batch, config.token_order), grid=grid)
    return out, recorder.masks[0][-1].to_dense()


@pytest.mark.parametrize("name", CASES)
def test_single_device_equals_float64_dense(name: str) -> None:
    config, grid, heads, batch = CASES[name]
    out, mask = _single(config, grid, heads, batch)
    q, k, v = _inputs(grid, heads, batch, config.token_order)
    expected, same_precision = (_dense(config, q, k, v, mask, dtype) for dtype in (torch.float64, torch.float32))
    assert_close(out, expected, relative_error(same_precision, expected))
    assert 0 < mask.double().mean() < 0.75, "the case is dense: it would not see a wrong block"


def _dense(config: SparseAttentionConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if config.remainder != "drop":
        return attention_with_remainder(q, k, v, mask, config.block_size, 0.25, config.remainder == "linear", dtype)
    return masked_attention(q, k, v, expand(mask, config.block_size, q.shape[1], k.shape[1]), 0.25, dtype)[0]


def _check_layer(rank: int, ulysses: int, ring: int, names: tuple[str, ...] = tuple(CASES)) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    for name in names:
        config, grid, heads, batch = CASES[name]
        expected, expected_mask = _single(config, grid, heads, batch)
        tensors = _inputs(grid, heads, batch, config.token_order)
        layer, recorder = _layer(config, mesh, heads)
        cuts = (layer.shards(grid), SequenceShards.equal(grid.num_tokens, mesh.sequence_degree))
        strategies = (SequenceParallelStrategy, AllGatherKVStrategy)[: 2 if ring > 1 else 1]
        for shards, chunks, strategy in product(cuts, (1, 3) if ulysses > 1 else (1,), strategies):
            layer.strategy = strategy(mesh, layer.strategy.block, head_chunks=chunks)
            first, last = shards.range_of(mesh.sequence_rank)
            held = shards.lengths[mesh.sequence_rank]
            # What a framework pads with is its own affair: NaN here shows if a padding token is ever attended.
            local = [torch.full((batch, held, heads, 16), float("nan")) for _ in range(3)]
            for mine, whole in zip(local, tensors, strict=True):
                mine[:, : last - first] = whole[:, first:last]
            out = layer(*local, grid=grid, shards=shards)
            error = relative_error(out[:, : last - first], expected[:, first:last]) if last > first else 0.0
            assert error < 2e-6, (name, shards, error)
            assert not out[:, last - first :].any(), "padding must come back as 0"
            got = recorder.masks[-1][-1].to_dense()
            assert torch.equal(got, _own_part(expected_mask, layer, shards)), (name, shards, "the mask differs")


def _own_part(mask: Tensor, layer: SparseAttention, shards: SequenceShards) -> Tensor:
    """Of the mask of the whole sequence and all heads, what this rank attends under."""
    mesh = layer.mesh
    ring_shards = shards.grouped(mesh.ulysses_degree).realigned(layer.strategy.block)
    rows = block_rows(*ring_shards.range_of(mesh.ring_rank), layer.config.block_size[0])
    counts = layer.strategy.heads(layer.num_heads)
    first_head = sum(counts[: mesh.ulysses_rank])
    return mask[:, first_head : first_head + counts[mesh.ulysses_rank], rows]


@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
def test_layer_is_the_same_on_every_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_layer, ulysses, ring)


@pytest.mark.parametrize(("ulysses", "ring"), REMAINDER_MESHES)
def test_the_remainder_is_the_same_on_5_6_and_7_ranks(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_layer, ulysses, ring, REMAINDER_CASES)


def _check_outliers(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    for name, dtype in product(REMAINDER_CASES, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        config, grid, heads, batch = CASES[name]
        q, k, v = _inputs(grid, heads, batch, config.token_order)
        q[:, ::9] *= 300
        k[:, ::7] *= 300
        q, k, v = (x.to(dtype) for x in (q, k, v))
        single, recorded = _layer(config, SequenceParallelMesh(), heads)
        single(q, k, v, grid=grid)
        mask = recorded.masks[0][-1].to_dense()
        layer, recorder = _layer(config, mesh, heads)
        shards = layer.shards(grid)
        mine = slice(*shards.range_of(mesh.sequence_rank))
        out = layer(q[:, mine], k[:, mine], v[:, mine], grid=grid, shards=shards)
        assert out.isfinite().all(), (name, dtype)
        assert torch.equal(recorder.masks[-1][-1].to_dense(), _own_part(mask, layer, shards)), (name, dtype)
        # Scores of 1e6 leave half precision no digits to compare.
        if dtype in (torch.float64, torch.float32):
            expected, same = (_dense(config, q, k, v, mask, kind) for kind in (torch.float64, torch.float32))
            limit = 1e-12 if dtype == torch.float64 else 8 * relative_error(same, expected)
            # On the scale of the whole: a shard may hold few of the outliers, which have most of the error.
            difference = (out.double() - expected[:, mine]).square().mean().sqrt()
            assert difference <= limit * expected.square().mean().sqrt(), (name, dtype)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (1, 5), (2, 3), (3, 2)])
def test_outliers_stay_exact_on_a_mesh(ulysses: int, ring: int) -> None:
    """Queries and keys of which some are 300 times the others."""
    run_ranks(ulysses * ring, _check_outliers, ulysses, ring)


def _random_mask(ring: int, heads: int, blocks: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Asymmetric, with rows that attend nothing at all, and rows that attend nothing of some shards."""
    mask = torch.rand(1, heads, *blocks, generator=generator) < 0.25
    mask[:, :, 1::5, : blocks[1] // 2] = False
    mask[:, :, 2::5, blocks[1] // ring :] = False
    mask[:, 0, 3] = False
    return mask


def _new_nan(self: Tensor, *shape: Any, **options: Any) -> Tensor:
    x = torch.empty(*shape, **{"dtype": self.dtype, "device": self.device, **options})
    return x.fill_(float("nan")) if x.is_floating_point() else x


def _check_masks(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    kernel = ReferenceKernel()
    for length, heads, block_size in ((331, 5, (16, 16)), (512, 4, (32, 16)), (450, 9, (8, 24))):
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, length, heads, 16, generator=generator) * s for s in (3.0, 3.0, 1.0))
        blocks = -(-length // block_size[0]), -(-length // block_size[1])
        dense = _random_mask(ring, heads, blocks, generator)
        tokens = expand(dense, block_size, length, length)
        expected, _ = masked_attention(q, k, v, tokens, 0.25)
        reference_error = relative_error(masked_attention(q, k, v, tokens, 0.25, torch.float32)[0], expected)
        strategy = SequenceParallelStrategy(mesh, block=48 if 24 in block_size else 32)
        for shards in (
            SequenceShards.aligned(length, strategy.block, ulysses, ring),
            SequenceShards.equal(length, ulysses * ring),
        ):
            first, last = shards.range_of(mesh.sequence_rank)
            pad = shards.lengths[mesh.sequence_rank] - (last - first)
            local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, pad)) for x in (q, k, v)]
            ql, kl, vl, ring_shards, context = strategy.pre_attention(local[0], local[1], local[2], shards)
            start, stop = ring_shards.range_of(mesh.ring_rank)
            counts = strategy.heads(heads)
            first_head = sum(counts[: mesh.ulysses_rank])
            part = dense[:, first_head : first_head + counts[mesh.ulysses_rank]]
            part = part[:, :, block_rows(start, stop, block_size[0])]
            mask = BlockMask.from_dense(part, block_size, stop - start, length)

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor | None]:
                assert mask is not None
                return kernel(q, k, v, mask, 0.25)

            for kind in (SequenceParallelStrategy, AllGatherKVStrategy):
                # What is not written must not be read: fresh buffers hold NaN.
                with mock.patch.object(Tensor, "new_empty", _new_nan):
                    out = kind(mesh, strategy.block).attend(attend, ql, kl, vl, mask, ring_shards)[0]
                out = strategy.post_attention(out, context)[:, : last - first]
                if last > first:
                    # A shard may hold fewer values than the whole: compare with the whole's error, on its scale.
                    difference = (out.double() - expected[:, first:last]).square().mean().sqrt()
                    assert difference <= 4 * reference_error * expected.square().mean().sqrt(), (length, kind)


@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
def test_any_mask_is_attended_alike_on_every_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_masks, ulysses, ring)
