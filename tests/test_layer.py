"""The layer beyond its masks: dense steps on every mesh, scale and dtype, and what the recorder measures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sp_sparse import (
    AttentionRecorder,
    SequenceParallelMesh,
    SequenceShards,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from tests.cases import random_tensors
from tests.oracle import assert_close, masked_attention, relative_error
from tests.ranks import run_ranks

CONFIG = SparseAttentionConfig(backend="reference", topk=0.25, block_size=(8, 8))
GRID = VideoGrid(3, 5, 7)
HEADS = 5


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return random_tensors(2, GRID.num_tokens, GRID.num_tokens, HEADS, 8, 0, dtype)


def _layer(config: SparseAttentionConfig, mesh: SequenceParallelMesh, **more: object) -> SparseAttention:
    return SparseAttention(config, mesh, num_heads=HEADS, head_dim=8, layer=1, **more)  # type: ignore[arg-type]


def _dense(tensors: tuple[Tensor, Tensor, Tensor], scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    tokens = torch.ones(2, HEADS, GRID.num_tokens, GRID.num_tokens, dtype=torch.bool)
    return masked_attention(*tensors, tokens, scale, dtype)[0]


def test_dense_and_sparse_steps() -> None:
    layer, tensors = _layer(CONFIG, SequenceParallelMesh()), _inputs()
    expected = _dense(tensors, 8**-0.5)
    error = relative_error(_dense(tensors, 8**-0.5, torch.float32), expected)
    assert_close(layer(*tensors, grid=GRID, step=0, num_steps=4), expected, error)
    assert relative_error(layer(*tensors, grid=GRID, step=1, num_steps=4), expected) > 0.05
    full = _layer(replace(CONFIG, schedule="constant", topk=1.0), SequenceParallelMesh())
    assert_close(full(*tensors, grid=GRID), expected, error)


def test_scale() -> None:
    layer, tensors = _layer(CONFIG, SequenceParallelMesh()), _inputs()
    out = layer(*tensors, grid=GRID, step=0, num_steps=4, scale=0.1)
    assert relative_error(out, _dense(tensors, 0.1)) < 1e-6
    sparse = _layer(replace(CONFIG, schedule="constant"), SequenceParallelMesh())
    by_scale = sparse(*tensors, grid=GRID, scale=0.5 * 8**-0.5)
    by_query = sparse(tensors[0] * 0.5, *tensors[1:], grid=GRID)
    assert relative_error(by_scale, by_query) < 1e-6


def _check_dense(rank: int, ulysses: int, ring: int) -> None:
    """Dense steps; NaN in padding shows if it is attended."""
    mesh = SequenceParallelMesh(ulysses, ring)
    layer = _layer(CONFIG, mesh)
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        tensors = _inputs(dtype)
        expected = _dense(tensors, 8**-0.5)
        for shards in (layer.shards(GRID), SequenceShards.equal(GRID.num_tokens, ulysses * ring)):
            first, last = shards.range_of(mesh.sequence_rank)
            local = [x.new_full((2, shards.lengths[mesh.sequence_rank], HEADS, 8), float("nan")) for x in tensors]
            for mine, whole in zip(local, tensors, strict=True):
                mine[:, : last - first] = whole[:, first:last]
            out = layer(*local, grid=GRID, step=0, num_steps=4, shards=shards)
            assert out.dtype == dtype
            assert relative_error(out[:, : last - first], expected[:, first:last]) < allowed
            assert not out[:, last - first :].any()


@pytest.mark.parametrize(("ulysses", "ring"), [(3, 1), (1, 4), (2, 3)])
def test_dense_steps_are_dense_on_every_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_dense, ulysses, ring)


def _run_recorded(mesh: SequenceParallelMesh) -> dict[str, object]:
    """Three sparse steps of one expert after a dense one, and a step of the other expert."""
    recorder = AttentionRecorder()
    layers = [_layer(CONFIG, mesh, recorder=recorder, expert=expert) for expert in (0, 1)]
    shards = layers[0].shards(GRID)
    first, last = shards.range_of(mesh.sequence_rank)
    local = [x[:, first:last] for x in _inputs()]
    for expert, step in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 3)):
        layers[expert](*local, grid=GRID, step=step, num_steps=4)
    return recorder.summary(mesh.groups)


def _check_recorder(rank: int, expected: dict[str, object]) -> None:
    for mesh in (SequenceParallelMesh(2, 2), SequenceParallelMesh(1, 4), SequenceParallelMesh(2, 1, cfg_degree=2)):
        summary = _run_recorded(mesh)
        assert summary["calls"] == expected["calls"] == {"dense": 1, "reference": 4}
        for mine, single in zip(summary["densities"], expected["densities"], strict=True):  # type: ignore[call-overload]
            assert mine["density"] == pytest.approx(single["density"], rel=1e-12)
            assert [mine[k] for k in ("expert", "layer", "step")] == [single[k] for k in ("expert", "layer", "step")]


def test_recorder_measures_the_density_of_all_ranks() -> None:
    expected = _run_recorded(SequenceParallelMesh())
    densities = expected["densities"]
    assert isinstance(densities, list)
    assert [(d["expert"], d["layer"], d["step"], d["dense_calls"]) for d in densities] == [
        (0, 1, 0, 1),
        (0, 1, 1, 0),
        (0, 1, 2, 0),
        (1, 1, 3, 0),
    ]
    # 4 of 14 key blocks (3.5 rounded up) a query block, of which the last holds one token.
    assert densities[0]["density"] == 1.0
    assert all(0.25 < d["density"] < 4 / 13 for d in densities[1:])
    run_ranks(4, _check_recorder, expected)


def test_recorder_without_calls() -> None:
    assert AttentionRecorder().summary() == {"calls": {}, "kv_exchange": [], "densities": []}
