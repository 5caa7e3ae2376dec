"""Merging by LSE against the whole softmax, and where a side saw nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sp_sparse.parallel.merge import merge
from tests.cases import random_blocks, random_tensors
from tests.oracle import expand, masked_attention, relative_error

INF = float("inf")
SCALE = 0.3


def _partials(parts: int, seed: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Attention over each of `parts` ranges of the keys, and over all of them."""
    q, k, v = random_tensors(2, 19, 12 * parts, 3, 8, seed, dtype)
    blocks = random_blocks((2, 3, 5, 3 * parts), seed, 0.2)
    mask = expand(blocks, (4, 4), 19, 12 * parts)
    pieces = [
        masked_attention(q, k_part, v_part, mask_part, SCALE, dtype)
        for k_part, v_part, mask_part in zip(k.split(12, 1), v.split(12, 1), mask.split(12, 3), strict=True)
    ]
    return pieces, *masked_attention(q, k, v, mask, SCALE)


def _merged(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out, lse = pieces[0][0].clone(), pieces[0][1].clone()
    for piece in pieces[1:]:
        out, lse = merge(out, lse, *piece)
    return out, lse


def _close_lse(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    empty = expected == -INF
    assert torch.equal(actual == -INF, empty)
    assert not empty.any() or empty.float().mean() < 1
    torch.testing.assert_close(actual[~empty].double(), expected[~empty].double(), rtol=tolerance, atol=tolerance)


@given(st.integers(1, 9), st.integers(0, 100))
def test_merged_parts_equal_the_whole(parts: int, seed: int) -> None:
    pieces, out, lse = _partials(parts, seed, torch.float64)
    merged, merged_lse = _merged(pieces)
    assert relative_error(merged, out) < 1e-14
    _close_lse(merged_lse, lse, 1e-14)
    assert not merged[:, 4:8].any(), "query block 1 attends nothing"


@given(st.permutations(range(4)), st.integers(0, 100))
def test_order_does_not_matter(order: list[int], seed: int) -> None:
    pieces, out, lse = _partials(4, seed, torch.float64)
    a, b, c, d = (pieces[i] for i in order)
    left = _merged([a, b, c, d])
    tree = merge(*_merged([a, b]), *_merged([c, d]))
    for merged, merged_lse in (left, tree):
        assert relative_error(merged, out) < 1e-14
        _close_lse(merged_lse, lse, 1e-14)


def test_fp32_parts_err_no_more_than_fp32_attention() -> None:
    pieces, out, lse = _partials(8, 3, torch.float32)
    q, k, v = random_tensors(2, 19, 96, 3, 8, 3, torch.float32)
    whole, _ = masked_attention(q, k, v, expand(random_blocks((2, 3, 5, 24), 3, 0.2), (4, 4), 19, 96), SCALE, q.dtype)
    merged, merged_lse = _merged(pieces)
    assert relative_error(merged, out) <= 4 * relative_error(whole, out)
    _close_lse(merged_lse, lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sides_without_keys(dtype: torch.dtype) -> None:
    """Rows: neither side, the left only, the right only, both."""
    lse = torch.tensor([-INF, 2.0, -INF, 1.0], dtype=dtype).view(1, 1, 4)
    new_lse = torch.tensor([-INF, -INF, 3.0, 1.0 + math.log(3)], dtype=dtype).view(1, 1, 4)
    out = torch.tensor([0.0, 5.0, 0.0, 1.0], dtype=dtype).view(1, 4, 1, 1)
    new_out = torch.tensor([0.0, 0.0, 7.0, 9.0], dtype=dtype).view(1, 4, 1, 1)
    merged, total = merge(out.clone(), lse, new_out, new_lse)
    assert merged.flatten().tolist() == pytest.approx([0.0, 5.0, 7.0, 7.0], rel=1e-6)
    assert total.flatten().tolist() == pytest.approx([-INF, 2.0, 3.0, 1.0 + math.log(4)], rel=1e-6)
    assert merged[0, :3].flatten().tolist() == [0.0, 5.0, 7.0], "a side alone is taken as it is, to the bit"


values = st.one_of(st.just(-INF), st.floats(-1e4, 1e4), st.floats(-3, 3))


@given(st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=6))
def test_weights_are_the_softmax_of_the_lses(rows: list[list[float]]) -> None:
    """Far-apart and missing LSEs: the weights stay those of an exact softmax, and nothing becomes NaN."""
    lse, new_lse = (torch.tensor([row[side] for row in rows], dtype=torch.float64).view(1, 1, -1) for side in (0, 1))
    seen = torch.stack([lse, new_lse]) > -INF
    one, two = (
        (side.double() * value).transpose(1, 2)[..., None] for side, value in zip(seen, (3.0, 5.0), strict=True)
    )
    out, total = merge(one.clone(), lse, two, new_lse)
    for i, row in enumerate(rows):
        top = max(row)
        if top == -INF:
            assert out[0, i].item() == 0.0
            assert total[0, 0, i].item() == -INF
            continue
        weights = [math.exp(x - top) for x in row]
        expected = (3.0 * weights[0] + 5.0 * weights[1]) / sum(weights)
        assert out[0, i].item() == pytest.approx(expected, rel=1e-11)
        assert total[0, 0, i].item() == pytest.approx(top + math.log(sum(weights)), rel=1e-12, abs=1e-12)


def test_accumulates_in_place_in_the_wider_dtype() -> None:
    out, new_out = torch.ones(1, 3, 2, 4), torch.full((1, 3, 2, 4), 2.0, dtype=torch.bfloat16)
    lse, new_lse = torch.zeros(1, 2, 3), torch.full((1, 2, 3), math.log(2.0))
    merged, total = merge(out, lse, new_out, new_lse)
    assert merged.data_ptr() == out.data_ptr()
    assert merged.dtype == total.dtype == torch.float32
    torch.testing.assert_close(merged, torch.full_like(out, 5 / 3))
    assert new_lse.eq(math.log(2.0)).all()


def test_heads_and_rows_keep_their_own_weights() -> None:
    """[B, S, H, D] meets [B, H, S]: an asymmetric table of LSEs tells a transposed one."""
    lse = torch.arange(6.0, dtype=torch.float64).view(1, 2, 3)
    out, total = merge(torch.zeros(1, 3, 2, 1, dtype=torch.float64), lse, torch.ones(1, 3, 2, 1), 2.0 - lse)
    for h, s in itertools.product(range(2), range(3)):
        weight = 1 / (1 + math.exp(2 * lse[0, h, s].item() - 2.0))
        assert out[0, s, h, 0].item() == pytest.approx(weight, rel=1e-12)
        assert total[0, h, s].item() == pytest.approx(math.log(math.exp(lse[0, h, s]) + math.exp(2 - lse[0, h, s])))
