"""The reference kernel and dense attention against float64 dense attention under the expanded mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sp_sparse import BlockMask
from sp_sparse.kernels import dense, reference
from sp_sparse.kernels.dense import dense_attention
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.mask import num_blocks
from tests.cases import narrowed, poisoned, random_blocks, random_tensors
from tests.oracle import assert_close, expand, masked_attention, relative_error

INF = float("inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.21


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call."""

    query_length: int
    key_length: int
    block_size: tuple[int, int]
    batch: int = 1
    heads: int = 3
    head_dim: int = 16


SHAPES = {
    "square": Shape(64, 64, (16, 16)),
    "ragged-both-ends": Shape(61, 83, (16, 16), batch=2),
    "wide-queries": Shape(90, 131, (32, 8), heads=1),
    "wide-keys": Shape(47, 150, (8, 24), head_dim=24),
    "few-queries": Shape(5, 100, (16, 8)),
    "one-key": Shape(33, 1, (8, 8), batch=2),
    "odd-blocks": Shape(40, 41, (7, 9)),
}


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], BlockMask, Tensor]:
    """q, k, v, the mask with a poisoned table, and the mask over tokens."""
    s = shape
    tensors = random_tensors(s.batch, s.query_length, s.key_length, s.heads, s.head_dim, s.query_length, dtype)
    rows, columns = num_blocks(s.query_length, s.block_size[0]), num_blocks(s.key_length, s.block_size[1])
    blocks = random_blocks((s.batch, s.heads, rows, columns), s.key_length)
    mask = BlockMask.from_dense(blocks, s.block_size, s.query_length, s.key_length)
    return tensors, poisoned(mask, 5), expand(blocks, s.block_size, s.query_length, s.key_length)


def _check(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> None:
    """Both results against the oracle, within twice the error of the same sums in the accumulation precision."""
    assert lse is not None
    expected, expected_lse = masked_attention(q, k, v, tokens, SCALE)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype) == (q.dtype, compute)
    assert (out.shape, lse.shape) == (q.shape, expected_lse.shape)
    same, same_lse = masked_attention(q, k, v, tokens, SCALE, compute)
    # In fp64 the reference is the oracle itself, and other sums are equal to some roundings.
    floor = torch.finfo(compute).eps * (16 if compute == torch.float64 else 1)
    assert_close(out, expected, max(relative_error(same.to(q.dtype), expected), floor))
    empty = ~tokens.any(-1)
    assert torch.equal(lse == -INF, empty)
    assert not out[empty.transpose(1, 2)].any(), "a row that attends nothing is 0"
    assert_close(lse[~empty], expected_lse[~empty], max(relative_error(same_lse[~empty], expected_lse[~empty]), floor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference_equals_oracle(name: str, dtype: torch.dtype) -> None:
    (q, k, v), mask, tokens = _inputs(SHAPES[name], dtype)
    _check(*ReferenceKernel()(q, k, v, mask, SCALE), q, k, v, tokens)


@pytest.mark.parametrize("budget", [1, 5000])
def test_reference_in_slices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), mask, tokens = _inputs(SHAPES["ragged-both-ends"], torch.float32)
    monkeypatch.setattr(reference, "_BUDGET", budget)
    _check(*ReferenceKernel()(q, k, v, mask, SCALE), q, k, v, tokens)


def test_reference_does_not_depend_on_table_width_or_tail() -> None:
    (q, k, v), mask, _ = _inputs(SHAPES["wide-keys"], torch.float64)
    expected, expected_lse = ReferenceKernel()(q, k, v, mask, SCALE)
    for other in (narrowed(mask), poisoned(mask, 6), BlockMask.from_dense(mask.to_dense(), (8, 24), 47, 150)):
        out, lse = ReferenceKernel()(q, k, v, other, SCALE)
        assert lse is not None
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)


def test_reference_never_uses_what_the_mask_drops() -> None:
    """Not even NaN and inf in the blocks that table tails name come through."""
    (q, k, v), mask, tokens = _inputs(SHAPES["square"], torch.float32)
    blocks = mask.to_dense()
    blocks[..., 1] = False
    tokens = expand(blocks, mask.block_size, 64, 64)
    mask = BlockMask.from_dense(blocks, mask.block_size, 64, 64)
    tails = torch.arange(mask.indices.shape[3]) >= mask.counts.unsqueeze(-1)
    mask = BlockMask(mask.indices.masked_fill(tails, 1), mask.counts, mask.block_size, 64, 64)
    clean = k.clone(), v.clone()
    for bad in (float("nan"), INF):
        k[:, 16:32], v[:, 16:32] = bad, bad
        _check(*ReferenceKernel()(q, k, v, mask, SCALE), q, *clean, tokens)


def test_reference_takes_any_strides() -> None:
    (q, k, v), mask, tokens = _inputs(SHAPES["ragged-both-ends"], torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    for x in (strided, wide):
        _check(*ReferenceKernel()(x[0], x[1], x[2], mask, SCALE), q, k, v, tokens)


def test_reference_does_not_write_its_inputs() -> None:
    (q, k, v), mask, _ = _inputs(SHAPES["square"], torch.float32)
    before = [x.clone() for x in (q, k, v, mask.indices, mask.counts)]
    ReferenceKernel()(q, k, v, mask, SCALE)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, mask.indices, mask.counts), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "query_length", "key_length", "heads"), [(1, 0, 20, 2), (1, 20, 0, 2), (0, 20, 20, 2), (1, 20, 20, 0)]
)
def test_zero_size(batch: int, query_length: int, key_length: int, heads: int, dtype: torch.dtype) -> None:
    q, k, v = random_tensors(batch, query_length, key_length, heads, 8, 0, dtype)
    blocks = torch.ones(batch, heads, num_blocks(query_length, 8), num_blocks(key_length, 8), dtype=torch.bool)
    mask = BlockMask.from_dense(blocks, (8, 8), query_length, key_length)
    for out, lse in (ReferenceKernel()(q, k, v, mask, SCALE), dense_attention(q, k, v, SCALE)):
        assert lse is not None
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert lse.shape == (batch, heads, query_length)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not out.any()
        assert (lse == -INF).all() or not lse.numel()


def test_lse_is_a_natural_log() -> None:
    """Keys of 0 score 0, so the LSE is the log of how many are attended."""
    q, k, v = torch.ones(1, 9, 1, 8), torch.zeros(1, 20, 1, 8), torch.ones(1, 20, 1, 8)
    blocks = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool).view(1, 1, 2, 3)
    out, lse = ReferenceKernel()(q, k, v, BlockMask.from_dense(blocks, (8, 8), 9, 20), 1.0)
    assert lse is not None
    assert lse[0, 0].tolist() == pytest.approx([math.log(12)] * 8 + [math.log(8)])
    assert out.flatten().tolist() == pytest.approx([1.0] * 72)
    _, dense_lse = dense_attention(q, k, v, 1.0)
    assert dense_lse[0, 0].tolist() == pytest.approx([math.log(20)] * 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dense_equals_oracle(name: str, dtype: torch.dtype) -> None:
    (q, k, v), _, tokens = _inputs(SHAPES[name], dtype)
    _check(*dense_attention(q, k, v, SCALE), q, k, v, torch.ones_like(tokens))


@pytest.mark.parametrize("budget", [1, 1000])
def test_dense_in_slices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), _, tokens = _inputs(SHAPES["ragged-both-ends"], torch.float32)
    monkeypatch.setattr(dense, "_BUDGET", budget)
    _check(*dense_attention(q, k, v, SCALE), q, k, v, torch.ones_like(tokens))


def test_lse_dtype_without_keys_ignores_the_default_dtype() -> None:
    q, k, v = random_tensors(1, 4, 0, 2, 8, 0, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, lse = dense_attention(q, k, v, SCALE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert lse.dtype == torch.float32
