"""Selectors by name: built in, from a package outside, by class path; whatever chooses, every mesh gives the same."""

from __future__ import annotations

import sys
from importlib import invalidate_caches
from pathlib import Path

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
from sp_sparse.selection.registry import SELECTORS, load_selector
from sp_sparse.selection.subblock import SubblockSelector
from sp_sparse.selection.topk import TopKSelector
from sp_sparse.selection.window import WindowSelector
from tests.cases import random_tensors
from tests.oracle import assert_close, block_rows, expand, masked_attention, relative_error
from tests.ranks import run_ranks

# Another package's selector: two summaries a block, integers, so that their products add up exactly in any order.
EXTREMES = '''
import torch
import torch.nn.functional as F
from sp_sparse.mask import BlockMask

class Extremes:
    """By the products of the largest and smallest entries of blocks; each head keeps a budget of its own."""

    def __init__(self, config):
        if config.block_size[0] == 256:
            raise ValueError("extremes: blocks of 256 queries are too large; use 128")
        self.block_size, self.topk = config.block_size, config.topk

    def _summarize(self, x, size):
        fixed = (x * 64).round().long()
        short = -x.shape[1] % size
        high = F.pad(fixed, (0, 0, 0, 0, 0, short), value=-(1 << 30)).unflatten(1, (-1, size)).amax(2)
        low = F.pad(fixed, (0, 0, 0, 0, 0, short), value=1 << 30).unflatten(1, (-1, size)).amin(2)
        return torch.stack((high, low), -1).transpose(1, 2)

    def summarize_queries(self, query):
        return self._summarize(query, self.block_size[0])

    def summarize_keys(self, key):
        return self._summarize(key, self.block_size[1])

    def select(self, queries, keys, request):
        scores = (queries[:, :, :, None] * keys[:, :, None]).sum((-1, -2))
        count = max(1, round(request.density * keys.shape[2]))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        dense = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order[..., :count], True)
        dense |= request.static.rows
        assert request.query_range[0] % self.block_size[0] == 0 and request.grid.num_tokens == request.key_length
        return BlockMask.from_dense(dense, self.block_size, request.query_length, request.key_length)
'''
ENTRY_POINTS = "[sp_sparse.selectors]\nextremes = outside_selectors:Extremes\nbroken = outside_selectors:Absent\n"

MESHES = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (1, 4), (2, 2), (2, 3), (4, 2), (1, 8)]
GRID, HEADS, BLOCK = VideoGrid(5, 7, 9), 5, (16, 8)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package outside that offers selectors, as pip would install it."""
    (tmp_path / "outside_selectors.py").write_text(EXTREMES)
    information = tmp_path / "outside_selectors-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-selectors\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_selectors", raising=False)
    invalidate_caches()


def _config(selector: str, **more: object) -> SparseAttentionConfig:
    options = {"backend": "reference", "schedule": "constant", "topk": 0.2, "block_size": BLOCK, **more}
    return SparseAttentionConfig.from_mapping({**options, "selector": selector})


def test_built_in() -> None:
    assert isinstance(load_selector(_config("topk")), TopKSelector)
    assert isinstance(load_selector(_config("window")), WindowSelector)
    assert isinstance(load_selector(_config("subblock")), SubblockSelector)
    assert SELECTORS.names()[:3] == ("topk", "subblock", "window")


@pytest.mark.usefixtures("outside")
def test_from_a_package_outside() -> None:
    by_name, by_path = (load_selector(_config(name)) for name in ("extremes", "outside_selectors:Extremes"))
    assert type(by_name) is type(by_path)
    assert type(by_name).__name__ == "Extremes"


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    ("selector", "more", "text"),
    [
        ("best", {}, "unknown selector 'best'; use one of topk, subblock, window, broken, extremes, or a class path"),
        ("broken", {}, "selector 'broken' cannot be loaded: .*Absent"),
        ("no_such_package:Selector", {}, "selector 'no_such_package:Selector' cannot be loaded: No module named"),
        ("json:dumps", {}, "selector 'json:dumps' is no class with summarize_queries, .*, select; give"),
        ("outside_selectors:Absent", {}, "cannot be loaded: .*Absent"),
        ("extremes", {"block_size": 256}, "extremes: blocks of 256 queries are too large; use 128"),
        ("window", {"keep_diagonal": False}, "could keep nothing; leave keep_diagonal on"),
    ],
)
def test_refused_at_construction(selector: str, more: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SparseAttention(_config(selector, **more), SequenceParallelMesh(), num_heads=4, head_dim=16)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return random_tensors(2, GRID.num_tokens, GRID.num_tokens, HEADS, 16, 0, torch.float32)


def _run(
    selector: str, exchange: str, mesh: SequenceParallelMesh, equal: bool = False
) -> tuple[Tensor, Tensor, SequenceShards]:
    """This rank's output and mask, and the cut."""
    config = _config(selector, kv_exchange=exchange, window=1)
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, mesh, num_heads=HEADS, head_dim=16, recorder=recorder)
    shards = SequenceShards.equal(GRID.num_tokens, mesh.sequence_degree) if equal else layer.shards(GRID)
    first, last = shards.range_of(mesh.sequence_rank)
    padding = shards.lengths[mesh.sequence_rank] - (last - first)
    local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding)) for x in _inputs()]
    out = layer(*local, grid=GRID, shards=shards)
    return out[:, : last - first], recorder.masks[0][-1].to_dense(), shards


@pytest.mark.usefixtures("outside")
def test_one_device_equals_float64_dense() -> None:
    out, mask, _ = _run("extremes", "ring", SequenceParallelMesh())
    tokens = expand(mask, BLOCK, GRID.num_tokens, GRID.num_tokens)
    expected, _ = masked_attention(*_inputs(), tokens, 0.25)
    same_precision, _ = masked_attention(*_inputs(), tokens, 0.25, torch.float32)
    assert_close(out, expected, relative_error(same_precision, expected))
    assert not torch.equal(mask, _run("topk", "ring", SequenceParallelMesh())[1]), "it is another selector"


def _check_mesh(rank: int, ulysses: int, ring: int, expected: Tensor, expected_mask: Tensor) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    for exchange, equal in (("ring", False), ("ring", True), ("all_gather", False)):
        out, mask, shards = _run("extremes", exchange, mesh, equal)
        first, last = shards.range_of(mesh.sequence_rank)
        if last > first:
            assert relative_error(out, expected[:, first:last]) < 2e-6
        start, stop = shards.grouped(ulysses).realigned(16).range_of(mesh.ring_rank)
        heads = [HEADS // ulysses + (i < HEADS % ulysses) for i in range(ulysses)]
        first_head = sum(heads[: mesh.ulysses_rank])
        mine = expected_mask[:, first_head : first_head + heads[mesh.ulysses_rank], block_rows(start, stop, BLOCK[0])]
        assert torch.equal(mask, mine), (exchange, equal)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(("ulysses", "ring"), MESHES)
def test_a_selector_from_outside_is_the_same_on_every_mesh(ulysses: int, ring: int) -> None:
    expected, mask, _ = _run("extremes", "ring", SequenceParallelMesh())
    run_ranks(ulysses * ring, _check_mesh, ulysses, ring, expected, mask)
