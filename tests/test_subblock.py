"""Selector `subblock`: shares of attention between parts of blocks, by their definition in float64 and to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SequenceShards, SparseAttention, SparseAttentionConfig
from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.selection import subblock_scores as scores_module
from sp_sparse.selection import topk as topk_module
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.exact_log2 import exact_exp2, exact_log2, log2_sum_of_four
from sp_sparse.selection.registry import load_selector
from sp_sparse.selection.static import StaticBlocks
from sp_sparse.selection.subblock_scores import part_means, part_sizes, subblock_scores
from sp_sparse.video import VideoGrid
from tests.cases import seeded
from tests.oracle import block_rows
from tests.ranks import run_ranks
from tests.triton_oracle import poisoned_empty


def _same_bits(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def _tokens(seed: int, length: int, heads: int = 2, head_dim: int = 16, scale: float = 2.0) -> Tensor:
    """`[2, length, heads, head_dim]`: tokens that drift, so that parts of a block differ."""
    generator = seeded(seed)
    drift = torch.randn(2, length // 5 + 1, heads, head_dim, generator=generator).repeat_interleave(5, 1)[:, :length]
    return (drift + 0.3 * torch.randn(drift.shape, generator=generator)) * scale


def _scores(query: Tensor, key: Tensor, blocks: tuple[int, int]) -> Tensor:
    sizes = [part_sizes(x.shape[1], block) for x, block in zip((query, key), blocks, strict=True)]
    return subblock_scores(part_means(query, blocks[0]), part_means(key, blocks[1]), *sizes)


def _definition(query: Tensor, key: Tensor, blocks: tuple[int, int]) -> Tensor:
    """float64, part by part: every token of a part stands for the part's mean."""
    parts = [x.double().split(block // 4, 1) for x, block in zip((query, key), blocks, strict=True)]
    queries, keys = (torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in some], 1) for some in parts)
    attention = torch.einsum("bshd,bthd->bhst", queries, keys).mul(query.shape[3] ** -0.5).log_softmax(-1)
    columns = torch.stack([part.logsumexp(-1) for part in attention.split(blocks[1], -1)], -1)
    rows = torch.stack([part.logsumexp(2) for part in columns.split(blocks[0], 2)], 2)
    # Relative to a full part of queries.
    return (rows - math.log(blocks[0] // 4)) * math.log2(math.e)


@given(
    blocks=st.sampled_from([(8, 8), (16, 8), (8, 24), (32, 16), (12, 20)]),
    lengths=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    seed=st.integers(0, 99),
)
def test_scores_are_the_attention_that_means_of_parts_give(
    blocks: tuple[int, int], lengths: tuple[int, int], seed: int
) -> None:
    query, key = _tokens(seed, lengths[0]), _tokens(seed + 100, lengths[1])
    scores = _scores(query, key, blocks)
    assert (scores.dtype, tuple(scores.shape[2:])) == (
        torch.float32,
        (num_blocks(lengths[0], blocks[0]), num_blocks(lengths[1], blocks[1])),
    )
    # Of exponents up to some 20, made of entries of 14 bits.
    assert (scores - _definition(query, key, blocks)).abs().max() < 0.02


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 13, 16])
def test_parts_of_a_short_block_count_their_own_tokens(tokens: int) -> None:
    """All tokens alike: a block's share is its share of the tokens, and a part without tokens has none."""
    query = key = torch.ones(1, 32 + tokens, 1, 4)
    scores = _scores(query, key, (16, 16))[0, 0]
    share = torch.tensor([16.0, 16.0, tokens]) / (32 + tokens)
    expected = share[None, :] * torch.tensor([16.0, 16.0, tokens])[:, None] / 4
    assert (scores.exp2() - expected).abs().max() < 2e-6


@given(st.integers(0, 50))
def test_scores_do_not_depend_on_shapes_slices_or_order(seed: int) -> None:
    """No sum of a row, no lane of a vector and no head beside it counts."""
    query, key = part_means(_tokens(seed, 150, 3), 16), part_means(_tokens(seed + 9, 203, 3), 8)
    sizes = part_sizes(150, 16), part_sizes(203, 8)
    scores = subblock_scores(query, key, *sizes)
    first = seed % 8
    some = subblock_scores(
        query[1:, 2:, first : first + 1], key[1:, 2:], (sizes[0][0] - 4 * first, sizes[0][1]), sizes[1]
    )
    assert _same_bits(some, scores[1:, 2:, first : first + 1])
    strided = key.permute(2, 0, 1, 3, 4).contiguous().movedim(0, 2)
    assert _same_bits(subblock_scores(query, strided, *sizes), scores)
    order = torch.randperm(25, generator=seeded(seed))
    shuffled = torch.cat((key[:, :, order], key[:, :, 25:]), 2)
    assert _same_bits(subblock_scores(query, shuffled, *sizes)[..., :25], scores[..., order])


def test_powers_and_logarithms() -> None:
    x = -torch.rand(100_003, generator=seeded(0)) * 126
    assert (exact_exp2(x).double() / x.double().exp2() - 1).abs().max() < 4e-7
    y = torch.exp2(torch.rand(100_003, generator=seeded(1)) * 200 - 100)
    assert ((exact_log2(y).double() - y.double().log2()) / y.double().log2().abs().clamp(min=1)).abs().max() < 4e-7
    assert exact_exp2(torch.tensor([0.0, -1.0, -126.0])).tolist() == [1.0, 0.5, 2.0**-126]
    assert exact_exp2(torch.tensor([-126.5, -1e30, -math.inf])).tolist() == [2.0**-126] * 3
    assert exact_log2(torch.tensor([1.0, 2.0, 1024.0, 0.125])).tolist() == [0.0, 1.0, 10.0, -3.0]
    parts = [torch.tensor([value]) for value in (3.0, -math.inf, 3.0, -math.inf)]
    assert log2_sum_of_four(parts).item() == 4.0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 1001])
def test_powers_have_the_same_bits_in_every_lane(length: int) -> None:
    for function, x in ((exact_exp2, -torch.rand(1001) * 20), (exact_log2, torch.rand(1001) + 0.1)):
        whole = function(x)
        for start in range(0, 1001 - length + 1, 97):
            assert _same_bits(function(x[start : start + length].clone()), whole[start : start + length])


def _config(**more: object) -> SparseAttentionConfig:
    options = {"backend": "reference", "schedule": "constant", "topk": 0.25, "block_size": (16, 8), **more}
    return SparseAttentionConfig.from_mapping({"selector": "subblock", **options})


def _select(config: SparseAttentionConfig, query: Tensor, key: Tensor, static: Tensor | None = None) -> BlockMask:
    selector = load_selector(config)
    queries, keys = selector.summarize_queries(query), selector.summarize_keys(key)
    assert queries is not None
    assert keys is not None
    rows = torch.zeros(queries.shape[2], keys.shape[2], dtype=torch.bool) if static is None else static
    length = query.shape[1]
    kept, grid = StaticBlocks.of(rows.numpy(), query.device), VideoGrid(1, 1, key.shape[1])
    batch, heads = queries.shape[:2]
    request = SelectionRequest(batch, heads, (0, length), key.shape[1], config.topk, kept, grid)
    return selector.select(queries, keys, request)


@pytest.mark.parametrize("length", [200, 203, 211, 216])
def test_the_highest_scores_are_kept_beside_the_static_blocks(length: int) -> None:
    query, key = _tokens(0, length), _tokens(1, length)
    static = torch.rand(num_blocks(length, 16), num_blocks(length, 8), generator=seeded(2)) < 0.2
    mask = _select(_config(), query, key, static).to_dense()
    assert (mask | ~static).all()
    expected = _definition(query, key, (16, 8)).masked_fill(static, math.inf)
    keep = static.sum(1).clamp(min=math.ceil(0.25 * static.shape[1]))
    assert torch.equal(mask.sum(-1), keep.expand(mask.shape[:3]))
    least = expected.masked_fill(~mask, math.inf).amin(-1)
    best_left = expected.masked_fill(mask, -math.inf).amax(-1)
    assert (least > best_left - 0.02).all()


def test_parts_see_what_means_cancel() -> None:
    """Halves of key block 3 are opposite: its mean is nothing, yet half of it is what every query looks for."""
    query, key = torch.zeros(1, 16, 1, 16), torch.zeros(1, 40, 1, 16)
    query[..., 0], key[:, 24:28, :, 0], key[:, 28:32, :, 0], key[:, 8:16, :, 0] = 4.0, 6.0, -6.0, 0.5
    kept = {
        name: _select(_config(selector=name, topk=0.2), query, key).indices.flatten().tolist()
        for name in ("topk", "subblock")
    }
    assert kept == {"topk": [1], "subblock": [3]}


def test_a_query_part_of_large_tokens_has_no_more_say_than_the_others() -> None:
    """Three parts look for block 1; the fourth, 50 times as large, for block 2."""
    query, key = torch.zeros(1, 16, 1, 16), torch.zeros(1, 40, 1, 16)
    query[:, :12, :, 0], query[:, 12:, :, 1] = 6.0, 300.0
    key[:, 8:16, :, 0], key[:, 16:24, :, 1] = 6.0, 6.0
    assert _select(_config(topk=0.2), query, key).indices.flatten().tolist() == [1]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 300.0, 1e4])
def test_outliers_keep_their_order(scale: float) -> None:
    """Logarithms reach where shares underflow: scores down to -1e8 are those of float64, to the precision of products."""
    query, key = _tokens(0, 120, scale=scale), _tokens(1, 120, scale=min(scale, 1.0))
    query[:, :, 1, 3] *= 300
    key[:, 60:, 1, 3] *= 300
    scores, expected = _scores(query, key, (16, 8)), _definition(query, key, (16, 8))
    assert ((scores - expected).abs() <= 2e-6 + 1e-3 * expected.abs().amax((2, 3), keepdim=True)).all()


def test_the_largest_numbers_give_finite_scores() -> None:
    query, key = _tokens(0, 120, scale=1e30), _tokens(1, 120, scale=1e30)
    assert _scores(query, key, (16, 8)).isfinite().all()
    assert _scores(query, torch.zeros_like(key), (16, 8)).isfinite().all()


def test_slices_make_the_same_mask_and_hold_no_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last block of queries has a full part, one of two tokens and two without: how they weigh decides its row.
    query, key = _tokens(0, 1606, 2), _tokens(1, 1606, 2)
    static = torch.eye(101, 201).bool()
    whole = _select(_config(topk=0.1), query, key, static)
    monkeypatch.setattr(topk_module, "_BUDGET", 1 << 16)
    monkeypatch.setattr(scores_module, "_BUDGET", 1 << 15)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        sliced = _select(_config(topk=0.1), query, key, static)
    assert torch.equal(sliced.indices, whole.indices)
    assert torch.equal(sliced.counts, whole.counts)
    # The tokens are 2 x 1606 x 2 x 16 numbers, the pairs of parts 2 x 2 x 404 x 804.
    assert largest <= 2 * 1616 * 2 * 16


def test_never_waits_for_the_device() -> None:
    """Tensors on `meta` hold no values, so anything that reads one raises."""
    x = torch.zeros(1, 50, 2, 16, device="meta", dtype=torch.bfloat16)
    static = torch.eye(4, 7).bool()
    assert _select(_config(), x, x, static).indices.shape == (1, 2, 4, 2)


@pytest.mark.parametrize("length", [0, 64])
def test_a_shard_without_tokens_selects_nothing(length: int) -> None:
    config = _config()
    selector = load_selector(config)
    queries, keys = selector.summarize_queries(torch.zeros(1, 0, 2, 16)), selector.summarize_keys(_tokens(0, 64)[:1])
    static = StaticBlocks.of(np.zeros((0, 8), dtype=np.bool_), torch.device("cpu"))
    request = SelectionRequest(1, 2, (length, length), 64, 0.25, static, VideoGrid(1, 8, 8))
    assert selector.select(queries, keys, request).indices.shape == (1, 2, 0, 2)


@pytest.mark.parametrize(
    ("block_size", "remedy"),
    [((10, 16), "10x16; use 8x16 or 12x16"), ((64, 33), "64x33; use 64x32 or 64x36"), ((9, 255), "8x252 or 12x256")],
)
def test_blocks_without_equal_parts_are_refused(block_size: tuple[int, int], remedy: str) -> None:
    with pytest.raises(ValueError, match=f"cuts blocks into 4 parts, but block_size is .*{remedy}, or selector 'topk'"):
        SparseAttention(_config(block_size=block_size), SequenceParallelMesh(), num_heads=2, head_dim=16)


GRID, HEADS = VideoGrid(5, 7, 9), 5


def _mask(config: SparseAttentionConfig, mesh: SequenceParallelMesh, equal: bool) -> tuple[Tensor, SequenceShards]:
    """This rank's mask of tokens with outliers of 300 times, which saturate shares of a row."""
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, mesh, num_heads=HEADS, head_dim=16, recorder=recorder)
    q, k = _tokens(0, GRID.num_tokens, HEADS), _tokens(1, GRID.num_tokens, HEADS)
    for outliers in (q[:, ::37, 1], k[:, ::41, 1], k[:, 100:, 2, 3], q[:, :, 3, 5]):
        outliers *= 300
    shards = SequenceShards.equal(GRID.num_tokens, mesh.sequence_degree) if equal else layer.shards(GRID)
    first, last = shards.range_of(mesh.sequence_rank)
    padding = shards.lengths[mesh.sequence_rank] - (last - first)
    local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding), value=math.nan) for x in (q, k, k)]
    layer(*local, grid=GRID, shards=shards)
    return recorder.masks[0][-1].to_dense(), shards


def _check_mesh(rank: int, ulysses: int, ring: int, expected: dict[tuple[int, int], Tensor]) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    for block_size, whole in expected.items():
        for exchange, equal in (("ring", False), ("ring", True), ("all_gather", False)):
            config = _config(kv_exchange=exchange, block_size=block_size, keep_diagonal=False)
            mask, shards = _mask(config, mesh, equal)
            start, stop = shards.grouped(ulysses).realigned(math.lcm(*block_size)).range_of(mesh.ring_rank)
            heads = [HEADS // ulysses + (i < HEADS % ulysses) for i in range(ulysses)]
            first_head = sum(heads[: mesh.ulysses_rank])
            mine = whole[:, first_head : first_head + heads[mesh.ulysses_rank], block_rows(start, stop, block_size[0])]
            assert torch.equal(mask, mine), (block_size, exchange, equal)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (4, 2), (1, 8)])
def test_masks_with_outliers_are_the_same_on_every_mesh(ulysses: int, ring: int) -> None:
    expected = {
        size: _mask(_config(block_size=size, keep_diagonal=False), SequenceParallelMesh(), False)[0]
        for size in ((16, 8), (8, 24))
    }
    run_ranks(ulysses * ring, _check_mesh, ulysses, ring, expected)
