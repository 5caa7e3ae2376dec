"""Selection: block summaries and scores exact to the bit, top-k and static blocks against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sp_sparse.mask import num_blocks
from sp_sparse.selection import summaries
from sp_sparse.selection.static import StaticBlocks, static_rows
from sp_sparse.selection.summaries import block_means, block_scores
from sp_sparse.selection.topk import blocks_kept, select_topk
from sp_sparse.selection.window import select_static
from tests.cases import seeded

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal shapes and equal bits, the sign of zero included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(_bits(actual), _bits(expected))


def _tokens(seed: int, batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Values over many magnitudes, some heads and channels far larger than others."""
    generator = seeded(seed)
    x = torch.randn(batch, length, heads, head_dim, generator=generator)
    x *= torch.exp(2 * torch.randn(1, 1, heads, head_dim, generator=generator))
    return (x + torch.randn(batch, 1, heads, head_dim, generator=generator)).to(dtype)


def _float64_means(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """float64 means, and the largest absolute value of each block and head, both `[B, H, N, D or 1]`."""
    parts = x.double().split(block, 1)
    means = torch.stack([part.mean(1) for part in parts], 2)
    largest = torch.stack([part.abs().amax((1, 3)) for part in parts], 2)
    return means, largest.unsqueeze(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    block=st.sampled_from([1, 2, 7, 8, 16, 64, 100, 128, 256]),
    length=st.integers(1, 600),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30]),
)
def test_block_means_equal_float64_means(dtype: torch.dtype, block: int, length: int, seed: int, scale: float) -> None:
    """To 2^-21 of the block's largest value: half a unit in 22 bits, and the rounding to fp32."""
    x = _tokens(seed, 1, length, 2, 4, torch.float32)
    x = (x if dtype == torch.float16 else x * scale).to(dtype)
    means = block_means(x, block)
    assert (means.dtype, means.shape) == (torch.float32, (1, 2, num_blocks(length, block), 4))
    expected, largest = _float64_means(x, block)
    assert ((means.double() - expected).abs() <= 2.0**-21 * largest).all()


def test_block_means_of_known_blocks() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0, -4.0, 0.0, 0.0, 9.0]).view(1, 8, 1, 1)
    assert block_means(x, 4).flatten().tolist() == [3.0, 1.25]
    assert block_means(x, 5).flatten().tolist() == pytest.approx([8 / 5, 3.0])
    assert block_means(x, 100).flatten().tolist() == [17 / 8]
    assert block_means(x[:, :0], 4).shape == (1, 1, 0, 1)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, -1e-30, 1.0, -3.0, 1e30, -2e36])
def test_block_means_of_constants(value: float) -> None:
    means = block_means(torch.full((1, 32, 1, 2), value), 16)
    assert means.isfinite().all()
    if abs(value) >= 1e-30 or value == 0:
        assert means.flatten().tolist() == pytest.approx([value] * 4, rel=2**-20)
    else:
        assert (means.abs() <= 2 * abs(value)).all(), "what underflows becomes 0"


def test_extreme_values_in_one_block_stay_with_their_head() -> None:
    x = torch.zeros(1, 16, 4, 2)
    x[:, :, 0], x[:, :, 1], x[:, 3, 2] = 1e30, 1e-30, 1e30
    x[:, 4, 2] = -1e30
    x[:, 5, 2] = 1e-30
    means = block_means(x, 16)[0, :, 0]
    assert means[0].tolist() == pytest.approx([1e30] * 2)
    assert means[1].tolist() == pytest.approx([1e-30] * 2), "a huge head does not swallow a tiny one"
    assert means[2].tolist() == [0.0, 0.0], "exact cancellation"
    assert means[3].tolist() == [0.0, 0.0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "part of a wider tensor": lambda x: torch.cat([x, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]],
    "every other head": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "fp32": Tensor.float,
    "fp64": Tensor.double,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_means_do_not_depend_on_layout_or_storage(layout: str, dtype: torch.dtype) -> None:
    x = _tokens(1, 2, 150, 3, 8, dtype)
    assert_same_bits(block_means(LAYOUTS[layout](x), 16), block_means(x, 16))


@given(st.data())
def test_block_means_of_a_part_are_that_part_of_the_block_means(data: st.DataObject) -> None:
    """The bits of a block's mean do not depend on which other heads, blocks and batches are held with it."""
    dtype, block = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([3, 8, 16, 64]))
    blocks, heads = 5, 4
    x = _tokens(data.draw(st.integers(0, 50)), 2, blocks * block - block // 3, heads, 8, dtype)
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    head = slice(data.draw(st.integers(0, heads - 1)), data.draw(st.integers(heads - 1, heads)))
    batch = slice(data.draw(st.integers(0, 1)), 2)
    part = block_means(x[batch, first * block : last * block, head], block)
    assert_same_bits(part, block_means(x, block)[batch, head, first:last])


@given(st.integers(0, 50), st.sampled_from([8, 37, 128, 256]))
def test_block_means_do_not_depend_on_the_order_of_tokens_or_channels(seed: int, block: int) -> None:
    x = _tokens(seed, 1, block, 2, 16, torch.float32)
    tokens, channels = torch.randperm(block, generator=seeded(seed)), torch.randperm(16, generator=seeded(seed + 1))
    means = block_means(x, block)
    assert_same_bits(block_means(x[:, tokens], block), means)
    assert_same_bits(block_means(x[..., channels], block), means[..., channels])


@pytest.mark.parametrize("budget", [1, 3000])
def test_block_means_in_slices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tokens(2, 2, 150, 3, 8, torch.bfloat16)
    expected = block_means(x, 16)
    monkeypatch.setattr(summaries, "_BUDGET", budget)
    assert_same_bits(block_means(x, 16), expected)


def _summaries(seed: int, blocks: int, head_dim: int = 32, scale: float = 1.0) -> Tensor:
    x = torch.randn(2, 3, blocks, head_dim, generator=seeded(seed))
    return x * torch.exp(torch.randn(2, 3, blocks, 1, generator=seeded(seed + 1))) * scale


@given(st.integers(0, 50), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.sampled_from([1e-30, 1e30]))
def test_scores_are_finite_whatever_the_scale(seed: int, query_scale: float, key_scale: float) -> None:
    query, key = _summaries(seed, 4, scale=query_scale), _summaries(seed + 7, 6, scale=key_scale)
    assert block_scores(query, key).isfinite().all()


@given(st.integers(0, 50), st.sampled_from([1e-6, 1.0, 1e9]), st.sampled_from([1e-6, 1.0, 1e9]))
def test_scores_are_dot_products(seed: int, query_scale: float, key_scale: float) -> None:
    """Each vector is rounded to 2^-14 of its largest entry, at worst to 2^-14 of twice it."""
    query, key = _summaries(seed, 4, scale=query_scale), _summaries(seed + 7, 6, scale=key_scale)
    scores = block_scores(query, key)
    assert (scores.dtype, scores.shape) == (torch.float32, (2, 3, 4, 6))
    largest = query.double().abs().amax(-1)[..., :, None] * key.double().abs().amax(-1)[..., None, :]
    assert ((scores - query.double() @ key.double().transpose(2, 3)).abs() <= 32 * 2.0**-12 * largest).all()


def test_scores_are_exact_integer_arithmetic() -> None:
    """Against integers in Python: the fixed-point vectors by their definition, their products exact, rounded once."""
    query, key = _summaries(3, 3), _summaries(4, 5)
    scores = block_scores(query, key)

    def fixed(x: list[float]) -> tuple[list[int], int]:
        exponent = math.frexp(max(map(abs, x)))[1] - 14
        return [round(math.ldexp(value, -exponent)) for value in x], exponent

    for b, h, i, j in np.ndindex(*scores.shape):
        q, q_exponent = fixed(query[b, h, i].tolist())
        k, k_exponent = fixed(key[b, h, j].tolist())
        exact = math.ldexp(sum(x * y for x, y in zip(q, k, strict=True)), q_exponent + k_exponent)
        assert scores[b, h, i, j].item() == np.float32(exact)


@given(st.integers(0, 50))
def test_scores_do_not_depend_on_shapes_or_order(seed: int) -> None:
    query, key = _summaries(seed, 9), _summaries(seed + 7, 11)
    scores = block_scores(query, key)
    channels = torch.randperm(32, generator=seeded(seed))
    assert_same_bits(block_scores(query[..., channels], key[..., channels]) + 0.0, scores + 0.0)
    assert_same_bits(block_scores(query[:, 1:2, 2:5], key[:, 1:2]), scores[:, 1:2, 2:5])
    assert_same_bits(block_scores(query[1:], key[1:, :, 3:4]), scores[1:, :, :, 3:4])
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(block_scores(strided, key), scores)


def test_scores_of_zeros() -> None:
    query, key = torch.zeros(1, 1, 2, 8), torch.ones(1, 1, 3, 8)
    assert block_scores(query, key).tolist() == [[[[0.0] * 3] * 2]]
    assert block_scores(key, key).eq(8.0).all()
    assert block_scores(torch.zeros(1, 1, 0, 8), key).shape == (1, 1, 0, 3)


@given(st.integers(1, 700), st.data())
def test_blocks_kept_rounds_up(blocks: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, blocks))
    assert blocks_kept(kept / blocks, blocks) == kept, "a share of whole blocks is that many"
    assert blocks_kept(1.0, blocks) == blocks
    assert blocks_kept(1e-12, blocks) == 1
    if kept < blocks:
        assert blocks_kept((kept + 0.5) / blocks, blocks) == kept + 1
    density = data.draw(st.floats(1e-6, 1.0))
    assert blocks_kept(density, blocks) >= density * blocks - 1e-6


def test_blocks_kept_of_known_shares() -> None:
    assert [blocks_kept(share, 10) for share in (0.1, 0.3, 0.31, 0.7, 0.999, 1.0)] == [1, 3, 4, 7, 10, 10]
    assert blocks_kept(0.3, 591) == 178
    assert blocks_kept(0.07 * 3, 100) == 21


def _brute_force(scores: Tensor, forced: Tensor, keep: int) -> Tensor:
    """Forced blocks first, then by score, ties to the lower block."""
    dense = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, i in np.ndindex(*scores.shape[:3]):
        row, must = scores[b, h, i].tolist(), forced[i].tolist()
        order = sorted(range(len(row)), key=lambda j: (not must[j], -row[j], j))
        dense[b, h, i, order[: max(keep, sum(must))]] = True
    return dense


@given(
    queries=st.integers(0, 5),
    keys=st.integers(1, 20),
    density=st.floats(0.01, 1.0),
    forced_share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 500),
)
def test_topk_equals_brute_force(
    queries: int, keys: int, density: float, forced_share: float, levels: int, seed: int
) -> None:
    generator = seeded(seed)
    scores = torch.randint(-levels, levels + 1, (2, 3, queries, keys), generator=generator).float() / 8
    negative = torch.rand(scores.shape, generator=generator) < 0.5
    scores = torch.where((scores == 0) & negative, -0.0, scores)
    forced = torch.rand(queries, keys, generator=generator) < forced_share
    static = StaticBlocks.of(forced.numpy(), CPU)
    mask = select_topk(scores, static, density, (8, 4), queries * 8, keys * 4 - 1)
    keep = blocks_kept(density, keys)
    assert torch.equal(mask.to_dense(), _brute_force(scores, forced, keep))
    assert mask.counts.is_contiguous()
    assert (mask.counts == forced.sum(1).clamp(min=keep)).all()
    used = torch.arange(mask.indices.shape[3]) < mask.counts.unsqueeze(-1)
    assert ((mask.indices.diff(dim=-1) > 0) | ~used[..., 1:]).all(), "ascending"
    assert ((mask.indices >= 0) & (mask.indices < keys)).all()


def test_ties_go_to_the_lower_block() -> None:
    scores = torch.tensor([[[[-0.0, 7.0, 0.0, 7.0, 7.0, -1.0]]]])
    static = StaticBlocks.of(np.zeros((1, 6), dtype=np.bool_), CPU)
    kept = [select_topk(scores, static, k / 6, (8, 8), 8, 48).indices.flatten().tolist() for k in range(1, 7)]
    assert kept == [[1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_extreme_scores_keep_their_order() -> None:
    scores = torch.tensor([1e-30, -1e38, 0.0, 1e38, -1e-30, 1e-45, -math.inf, math.inf])
    static = StaticBlocks.of(np.zeros((1, 8), dtype=np.bool_), CPU)
    order: list[int] = []
    for k in range(1, 9):
        kept = select_topk(scores.view(1, 1, 1, 8), static, k / 8, (8, 8), 8, 64).indices.flatten().tolist()
        order += [block for block in kept if block not in order]
    assert order[:3] == [7, 3, 0]
    assert order[-3:] == [4, 1, 6]


def test_forced_blocks_beat_any_score_and_may_exceed_the_share() -> None:
    scores = torch.tensor([[1e38, 3.0, 2.0, 1.0], [math.inf, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]])
    forced = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=np.bool_)
    mask = select_topk(scores.view(1, 1, 3, 4), StaticBlocks.of(forced, CPU), 0.5, (8, 8), 24, 32)
    assert mask.counts.flatten().tolist() == [2, 3, 2]
    assert mask.indices.shape[3] == 3
    assert mask.to_dense().flatten(0, 2).int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 0, 0]]


def test_selection_never_waits_for_the_device() -> None:
    """Tensors on `meta` hold no values, so anything that reads one raises."""
    meta = torch.device("meta")
    x = torch.zeros(1, 50, 2, 16, device=meta, dtype=torch.bfloat16)
    means = block_means(x, 16)
    static = StaticBlocks.of(np.eye(4, dtype=np.bool_), meta)
    mask = select_topk(block_scores(means, means), static, 0.5, (16, 16), 50, 50)
    assert mask.indices.shape == (1, 2, 4, 2)
    assert select_static(static, 1, 2, (16, 16), 50, 50).counts.shape == (1, 2, 4)


@given(
    length=st.integers(1, 90),
    query_block=st.integers(1, 12),
    key_block=st.integers(1, 12),
    window=st.integers(0, 3),
    diagonal=st.booleans(),
    flags=st.one_of(st.none(), st.integers(0, 1000)),
    data=st.data(),
)
def test_static_rows_equal_brute_force(
    length: int, query_block: int, key_block: int, window: int, diagonal: bool, flags: int | None, data: st.DataObject
) -> None:
    """From the tokens: a pair of blocks is kept if some token of one calls for some token of the other."""
    first = query_block * data.draw(st.integers(0, num_blocks(length, query_block) - 1))
    last = data.draw(st.integers(first, length))
    last = last if last == length else last // query_block * query_block
    first_frame = None
    if flags is not None:
        first_frame = (torch.rand(length, generator=seeded(flags)) < 0.1).numpy()
    rows = static_rows(
        length, (query_block, key_block), (first, last), keep_diagonal=diagonal, window=window, first_frame=first_frame
    )
    keys = num_blocks(length, key_block)
    expected = np.zeros((num_blocks(last - first, query_block), keys), dtype=np.bool_)
    for token in range(first, last):
        i = (token - first) // query_block
        if diagonal:
            for j in range(keys):
                expected[i, j] |= abs(token // key_block - j) <= window
        if first_frame is not None:
            for key in range(length):
                expected[i, key // key_block] |= bool(first_frame[key])
    assert np.array_equal(rows, expected)


def test_static_blocks_of_an_empty_shard() -> None:
    rows = static_rows(64, (16, 8), (64, 64), keep_diagonal=True, window=1, first_frame=None)
    assert rows.shape == (0, 8)
    assert StaticBlocks.of(rows, CPU).most == 0


def test_select_static_is_the_same_for_every_head() -> None:
    rows = static_rows(61, (16, 8), (16, 61), keep_diagonal=True, window=1, first_frame=None)
    mask = select_static(StaticBlocks.of(rows, CPU), 2, 3, (16, 8), 45, 61)
    assert torch.equal(mask.to_dense(), torch.from_numpy(rows).expand(2, 3, 3, 8))
    assert (mask.query_length, mask.key_length) == (45, 61)
