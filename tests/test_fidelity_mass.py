"""True attention mass of blocks: against float64 softmax, as a selector on every mesh, and as the share a mask covers."""

from __future__ import annotations

from dataclasses import replace

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
from sp_sparse.fidelity.mass import block_mass, block_tokens, covered_mass
from sp_sparse.fidelity.observe import MaskObserver, Place, Seen, assemble, spread
from sp_sparse.parallel.agreement import every_value
from tests.oracle import block_rows
from tests.ranks import run_ranks, world_group

MASS = "sp_sparse.fidelity.mass:BlockMassSelector"
CONFIG = SparseAttentionConfig(
    backend="reference", schedule="constant", topk=0.2, block_size=(16, 16), keep_diagonal=False, selector=MASS
)

# (config, grid, heads): short last blocks, unequal blocks, heads that do not divide.
CASES = {
    "ragged": (CONFIG, VideoGrid(5, 7, 9), 5),
    "wide-keys": (replace(CONFIG, block_size=(8, 24), keep_diagonal=True), VideoGrid(3, 9, 11), 4),
    "hilbert": (replace(CONFIG, block_size=(32, 8), token_order="hilbert"), VideoGrid(5, 7, 9), 4),
}


def _tokens(grid: VideoGrid, heads: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Far from uniform attention, with outliers in a few keys."""
    generator = torch.Generator().manual_seed(grid.num_tokens + heads)
    shape = (batch, grid.num_tokens, heads, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k[:, ::50, :, 3] *= 300
    return 1.5 * q, 1.5 * k, v


def _brute_force(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Block by block, `[B, H, Nq, Nk]`."""
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    rows = [part.mean(2) for part in weights.split(block_size[0], 2)]
    return torch.stack([torch.stack([c.sum(-1) for c in row.split(block_size[1], -1)], -1) for row in rows], 2)


@pytest.mark.parametrize("block_size", [(16, 16), (8, 24), (32, 8), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_is_that_of_a_float64_softmax(
    block_size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = VideoGrid(5, 7, 9)
    q, k, _ = (x.to(dtype) for x in _tokens(grid, 3, batch=2))
    expected = _brute_force(q, k, block_size)
    blocks = block_tokens(q, block_size[0]), block_tokens(k, block_size[1])
    length = grid.num_tokens
    mass = block_mass(*blocks, length, length)
    assert (mass - expected).abs().max() < 2e-5  # tokens are rounded to 22 bits of their largest value
    assert (mass.sum(-1) - 1).abs().max() < 1e-9
    monkeypatch.setattr("sp_sparse.fidelity.mass._BUDGET", 1)
    assert torch.equal(block_mass(*blocks, length, length), mass), "it depends on how many rows are taken at a time"


def test_a_sequence_too_long_to_be_exact_is_refused() -> None:
    keys = torch.zeros(1, 1, 1, 128, 16)
    with pytest.raises(ValueError, match=r"takes at most 262144 tokens, 256 and 256: use another selector"):
        block_mass(keys, keys, 128, (1 << 18) + 1)


def test_covered_mass_is_the_sum_over_kept_blocks() -> None:
    q, k, _ = _tokens(VideoGrid(5, 7, 9), 3)
    length = q.shape[1]
    mass = block_mass(block_tokens(q, 16), block_tokens(k, 16), length, length)
    dense = torch.rand(mass.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = BlockMask.from_dense(dense, (16, 16), length, length)
    assert torch.allclose(covered_mass(mass, mask), (mass * dense).sum(-1), rtol=0, atol=1e-12)


def _single(name: str) -> Tensor:
    config, grid, heads = CASES[name]
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, SequenceParallelMesh(), num_heads=heads, head_dim=16, recorder=recorder)
    layer(*_tokens(grid, heads), grid=grid)
    return recorder.masks[0][-1].to_dense()


@pytest.mark.parametrize("name", CASES)
def test_the_selector_keeps_the_largest_masses(name: str) -> None:
    config, grid, heads = CASES[name]
    q, k, _ = _tokens(grid, heads)
    expected, kept = _brute_force(q, k, config.block_size), _single(name)
    least_kept = torch.where(kept, expected, 2.0).amin(-1)
    most_left = torch.where(kept, -1.0, expected).amax(-1)
    if not config.keep_diagonal:  # a kept diagonal block may hold less
        assert (least_kept >= most_left - 2e-5).all()
    others = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(
        replace(config, selector="topk"), SequenceParallelMesh(), num_heads=heads, head_dim=16, recorder=others
    )
    layer(*_tokens(grid, heads), grid=grid)
    assert (expected * kept).sum() > (expected * others.masks[0][-1].to_dense()).sum(), "it is no bound"


def _check_mesh(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    for name, (config, grid, heads) in CASES.items():
        expected = _single(name)
        recorder = AttentionRecorder(keep_masks=True)
        layer = SparseAttention(config, mesh, num_heads=heads, head_dim=16, recorder=recorder)
        for shards in (layer.shards(grid), SequenceShards.equal(grid.num_tokens, mesh.sequence_degree)):
            _call(layer, grid, heads, shards)
            start, stop = shards.grouped(ulysses).realigned(layer.strategy.block).range_of(mesh.ring_rank)
            counts = layer.strategy.heads(heads)
            first_head = sum(counts[: mesh.ulysses_rank])
            rows = block_rows(start, stop, config.block_size[0])
            wanted = expected[:, first_head : first_head + counts[mesh.ulysses_rank], rows]
            assert torch.equal(recorder.masks[-1][-1].to_dense(), wanted), (name, shards)


def _call(layer: SparseAttention, grid: VideoGrid, heads: int, shards: SequenceShards) -> Tensor:
    first, last = shards.range_of(layer.mesh.sequence_rank)
    pad = shards.lengths[layer.mesh.sequence_rank] - (last - first)
    local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, pad)) for x in _tokens(grid, heads)]
    return layer(local[0], local[1], local[2], grid=grid, shards=shards, step=1, num_steps=4)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (2, 2), (3, 1)])
def test_the_selector_is_the_same_on_every_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_mesh, ulysses, ring)


def _observed(mesh: SequenceParallelMesh, selector: str) -> tuple[Tensor, dict[Place, Seen]]:
    config, grid, heads = CASES["ragged"]
    observer = MaskObserver(layers=1, first_step=0, num_steps=4)
    layer = SparseAttention(
        replace(config, selector=selector, keep_diagonal=True), mesh, num_heads=heads, head_dim=16, recorder=observer
    )
    observer.watch([layer])
    out = _call(layer, grid, heads, layer.shards(grid))
    _call(layer, grid, heads, layer.shards(grid))  # of another guidance branch: not looked at
    return out, observer.seen


def _check_observer(rank: int, ulysses: int, ring: int) -> None:
    heads = CASES["ragged"][2]
    for selector in ("topk", "window", MASS):
        _, alone = _observed(SequenceParallelMesh(), selector)
        expected = assemble([alone], heads)
        _, seen = _observed(SequenceParallelMesh(ulysses, ring), selector)
        together = assemble(list(every_value(seen, (world_group(),)).values()), heads)
        assert together["places"].tolist() == [[0, 0, 1]]
        assert (together["masks"] == expected["masks"]).all()
        assert abs(together["covered"] - expected["covered"]).max() < 1e-12


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (2, 2)])
def test_what_is_seen_of_masks_is_the_same_on_every_mesh(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_observer, ulysses, ring)


def test_the_observer_sees_the_mask_and_what_it_covers_and_changes_nothing() -> None:
    config, grid, heads = CASES["ragged"]
    out, seen = _observed(SequenceParallelMesh(), "topk")
    recorder = AttentionRecorder(keep_masks=True)
    config = replace(config, selector="topk", keep_diagonal=True)
    layer = SparseAttention(config, SequenceParallelMesh(), num_heads=heads, head_dim=16, recorder=recorder)
    assert torch.equal(_call(layer, grid, heads, layer.shards(grid)), out)
    mask = recorder.masks[0][-1].to_dense()
    whole = assemble([seen], heads)
    assert whole["heads"].tolist() == spread(0, heads) == [0, 1, 3, 4]
    assert torch.equal(torch.from_numpy(whole["masks"][0]), mask[0, spread(0, heads)])
    q, k, _ = _tokens(grid, heads)
    rows = torch.tensor([16.0] * (grid.num_tokens // 16) + [grid.num_tokens % 16]).double()
    covered = (_brute_force(q, k, (16, 16)) * mask).sum(-1) @ rows / rows.sum()
    assert (torch.from_numpy(whole["covered"][0]) - covered[0]).abs().max() < 2e-5


def test_numbers_are_spread_evenly() -> None:
    assert spread(0, 10) == [0, 3, 6, 9]
    assert spread(2, 5) == [2, 3, 4]
    assert spread(3, 3) == []
