"""What surrounds a call changes nothing: a default device, autocast; and what it holds stays small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_sparse import (
    AttentionRecorder,
    BlockMask,
    SequenceParallelMesh,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from sp_sparse.integrations.opaque import OpaqueCall
from sp_sparse.kernels.dense import dense_attention
from sp_sparse.selection import topk
from sp_sparse.selection.static import StaticBlocks, StaticPlans, static_rows
from sp_sparse.selection.window import select_static
from tests.cases import random_tensors

GRID = VideoGrid(5, 8, 8)
CONFIGS = [
    {"topk": 0.4, "token_order": "hilbert", "keep_first_frame": True},
    {"selector": "window", "window": 1},
    {"topk": 1.0},
]


def _layer(**options: Any) -> SparseAttention:
    config = SparseAttentionConfig(backend="reference", schedule="constant", block_size=(16, 16), **options)
    return SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=64, recorder=AttentionRecorder())


@pytest.mark.parametrize("options", CONFIGS)
def test_default_device_and_autocast_change_nothing(options: dict[str, Any]) -> None:
    tensors = random_tensors(1, 320, 320, 2, 64, 0, torch.float32)
    expected = _layer(**options)(*tensors, grid=GRID)
    with torch.device("meta"):
        layer = _layer(**options)
        assert torch.equal(layer(*tensors, grid=GRID), expected)
    assert layer.recorder is not None
    assert layer.recorder.summary()["densities"] == _recorded(options, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_layer(**options)(*tensors, grid=GRID), expected)


def _recorded(options: dict[str, Any], tensors: tuple[Tensor, ...]) -> object:
    layer = _layer(**options)
    layer(*tensors, grid=GRID)
    assert layer.recorder is not None
    return layer.recorder.summary()["densities"]


def test_dense_attention_keeps_away_from_autocast() -> None:
    q, k, v = random_tensors(1, 50, 70, 2, 16, 0, torch.float32)
    expected = dense_attention(q, k, v, 0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, wanted in zip(dense_attention(q, k, v, 0.25), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_the_compiled_operator_finds_its_object_under_any_default_device() -> None:
    with torch.device("meta"):
        call = OpaqueCall(lambda q, k, v, *sizes: q + 1)
    x = torch.arange(16.0).view(1, 4, 2, 2)
    out = torch.compile(lambda q: call(q * 1, q, q, 1, 2, 3), backend="eager")(x)
    assert torch.equal(out, x + 1)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x._base is None:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def _window(blocks: int, heads: int) -> BlockMask:
    length = blocks * 16
    rows = static_rows(length, (16, 16), (0, length), keep_diagonal=True, window=2, first_frame=None)
    return select_static(StaticBlocks.of(rows, torch.device("cpu")), 1, heads, (16, 16), length, length)


def test_a_window_mask_has_a_column_a_kept_block() -> None:
    mask = _window(100, 3)
    assert mask.indices.shape == (1, 3, 100, 5)
    distance = (torch.arange(100)[:, None] - torch.arange(100)).abs()
    assert torch.equal(mask.to_dense(), (distance <= 2).expand(1, 3, 100, 100))


def test_measuring_a_density_makes_nothing_larger_than_its_rows() -> None:
    mask = BlockMask.from_dense(torch.rand(1, 2, 300, 300) < 0.3, (16, 16), 4793, 4793)
    with _Largest() as largest:
        pairs = mask.attended_pairs()
    assert largest.bytes <= 2 * 300 * 8
    tokens = mask.to_dense().repeat_interleave(16, 2)[:, :, :4793].repeat_interleave(16, 3)[..., :4793]
    assert pairs.item() == tokens.sum().item()


def test_scores_are_held_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mask, and no score tensor above the budget."""
    tensors = random_tensors(1, 320, 320, 2, 64, 0, torch.float32)
    options = {"topk": 0.3, "keep_first_frame": True}
    recorders = [AttentionRecorder(keep_masks=True) for _ in range(2)]
    for recorder, budget in zip(recorders, (1 << 26, 3 * 2 * 20), strict=True):
        monkeypatch.setattr(topk, "_BUDGET", budget)
        layer = _layer(**options)
        layer.recorder = recorder
        queries, keys = layer.selector.summarize_queries(tensors[0]), layer.selector.summarize_keys(tensors[1])
        with _Largest() as largest:
            layer.selector.select(queries, keys, _request(layer))
        if budget < 1 << 26:
            assert largest.bytes <= max(8 * budget, 2 * 20 * 64 * 8)
        layer(*tensors, grid=GRID)
    assert torch.equal(recorders[0].masks[0][-1].to_dense(), recorders[1].masks[0][-1].to_dense())


def _request(layer: SparseAttention) -> Any:
    from sp_sparse.selection.base import SelectionRequest

    static = layer._static_plans.blocks(GRID, (0, 320), torch.device("cpu"))
    return SelectionRequest(1, 2, (0, 320), 320, 0.3, static, GRID)


def test_plans_of_the_oldest_video_go() -> None:
    plans = StaticPlans(SparseAttentionConfig(backend="reference", block_size=(16, 16)), most=2)
    grids = [VideoGrid(1, 4, width) for width in (4, 8, 12)]
    made = [plans.blocks(grid, (0, grid.num_tokens), torch.device("cpu")) for grid in grids]
    assert len(plans._plans) == 2
    assert plans.blocks(grids[2], (0, 48), torch.device("cpu")) is made[2]
    assert plans.blocks(grids[0], (0, 16), torch.device("cpu")) is not made[0]
    assert len(plans._plans) == 2
