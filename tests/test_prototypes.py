"""Prototypes of selectors: found by class path, as dense as asked for, and the true mass is what its name says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from launch.prototypes import selectors
from sp_sparse import (
    AttentionRecorder,
    BlockMask,
    SequenceParallelMesh,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from tests.cases import seeded

NAMES = [
    "TrueMass",
    "Maximum",
    "Shares",
    "EighthShares",
    "MaximumShares",
    "VarianceShares",
    "VarianceMeans",
    "MeanAndLargest",
    "HeadBudgets",
]
GRID, HEADS, BLOCK = VideoGrid(4, 9, 9), 3, (16, 8)


def _inputs() -> tuple[Tensor, Tensor]:
    """Tokens that drift, so that blocks and their parts differ."""
    generator = seeded(0)
    drift = torch.randn(2, GRID.num_tokens // 6, HEADS, 16, generator=generator).repeat_interleave(6, 1)
    q, k = (drift + torch.randn(drift.shape, generator=generator) for _ in range(2))
    return q * 1.5, k


def _mask(selector: str) -> BlockMask:
    config = SparseAttentionConfig(
        backend="reference", schedule="constant", topk=0.2, block_size=BLOCK, selector=selector
    )
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, SequenceParallelMesh(), num_heads=HEADS, head_dim=16, recorder=recorder)
    query, key = _inputs()
    layer(query, key, key, grid=GRID)
    return recorder.masks[0][-1]


def _recall(dense: Tensor) -> float:
    query, key = _inputs()
    attention = torch.einsum("bshd,bthd->bhst", query.double(), key.double()).mul(0.25).softmax(-1)
    mask = dense.repeat_interleave(BLOCK[0], 2).repeat_interleave(BLOCK[1], 3)
    return (attention * mask[:, :, : GRID.num_tokens, : GRID.num_tokens]).sum(-1).mean().item()


def test_every_prototype_is_tested() -> None:
    made = {
        name
        for name, value in vars(selectors).items()
        if isinstance(value, type) and value.__module__ == selectors.__name__
    }
    assert made - {"Blocks", "Prototype"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_density_static_blocks_and_recall(name: str) -> None:
    mask, topk, bound = (
        _mask(x) for x in (f"launch.prototypes.selectors:{name}", "topk", "launch.prototypes.selectors:TrueMass")
    )
    dense = mask.to_dense()
    columns = math.ceil(GRID.num_tokens / BLOCK[1])
    rows, blocks = torch.arange(dense.shape[2])[:, None], torch.arange(columns)
    assert dense[:, :, blocks // 2 == rows].all(), "the diagonal is kept"
    if name == "HeadBudgets":
        assert torch.equal(mask.counts.sum(1), topk.counts.sum(1))
        assert not torch.equal(mask.counts, topk.counts), "budgets differ by head"
        assert (mask.counts >= math.ceil(0.1 * columns)).all()
    else:
        assert torch.equal(mask.counts, topk.counts)
        assert _recall(dense) <= _recall(bound.to_dense()) + 1e-6
    assert _recall(dense) > _recall(topk.to_dense()) - 0.03, "no worse than means by much"


def test_quarters_are_those_of_subblock() -> None:
    same = _mask("launch.prototypes.selectors:Shares").to_dense() == _mask("subblock").to_dense()
    assert same.double().mean() > 0.995, "but for near-ties"


def test_blocks_that_do_not_divide_are_refused() -> None:
    config = SparseAttentionConfig(
        backend="reference", block_size=(12, 16), selector="launch.prototypes.selectors:EighthShares"
    )
    with pytest.raises(ValueError, match=r"EighthShares cuts blocks into 8 parts, .*\(12, 16\); use multiples of 8"):
        SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=16)
