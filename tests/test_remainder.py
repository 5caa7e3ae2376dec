"""The remainder against its definition in float64: parts that a mask leaves out, one layer, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from sp_sparse import BlockMask, SequenceParallelMesh, SparseAttention, SparseAttentionConfig
from sp_sparse.config import REMAINDERS
from sp_sparse.kernels import registry
from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.remainder import attend, means
from sp_sparse.remainder.attend import add_remainder, attend_means
from sp_sparse.remainder.means import block_means
from tests.cases import poisoned, random_blocks, random_tensors
from tests.oracle import assert_close, expand, masked_attention, relative_error
from tests.ranks import run_ranks
from tests.remainder_cases import fused, means_like, problem
from tests.remainder_oracle import attention_with_remainder
from tests.triton_marks import needs_triton, on_gpu, run_interpreted
from tests.triton_oracle import poisoned_empty

SCALE = 0.21
CONFIG = SparseAttentionConfig(backend="reference", schedule="constant", topk=0.2, block_size=(16, 16))


@needs_triton
def test_under_the_interpreter() -> None:
    run_interpreted("remainder_interpreted.py")


@on_gpu
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128), (256, 128)])
def test_compiled(block_size: tuple[int, int], head_dim: int, dtype: torch.dtype, linear: bool) -> None:
    case = problem(block_size, head_dim, dtype, "cuda", 900, 1310)
    means_like(case, linear)
    for tma in (True, False):
        fused(case, linear, tma=tma)


@on_gpu
def test_compiled_with_outliers() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        case = problem((128, 128), 128, dtype, "cuda", 700, 700)
        case.query[:, ::17] *= 300
        case.key[:, ::13] *= 300
        assert fused(case, True, compare=False).isfinite().all()


@on_gpu
def test_a_cuda_graph_holds_the_layer() -> None:
    config = replace(CONFIG, backend="auto", block_size=(128, 128), remainder="linear")
    layer = SparseAttention(config, SequenceParallelMesh(), num_heads=4, head_dim=128, check_calls=False)
    tensors = [torch.randn(1, 1300, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = layer(*tensors, grid=(1, 26, 50))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*tensors, grid=(1, 26, 50))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)


def _whole(
    linear: bool, dtype: torch.dtype, block_size: tuple[int, int] = (8, 12), lengths: tuple[int, int] = (75, 101)
) -> tuple[Tensor, Tensor, Tensor]:
    """What the remainder makes of exact attention, its definition, and the definition in the same precision."""
    q, k, v = random_tensors(2, *lengths, 3, 16, 5, dtype)
    blocks = random_blocks((2, 3, -(-lengths[0] // block_size[0]), -(-lengths[1] // block_size[1])), 9)
    mask = poisoned(BlockMask.from_dense(blocks, block_size, *lengths), 1)
    out, lse = ReferenceKernel()(q, k, v, mask, SCALE)
    with mock.patch.object(torch, "empty", poisoned_empty):
        stand_ins = block_means(k, v, block_size[1], linear)
        result = add_remainder(out, lse, q, stand_ins, mask, SCALE)
    assert result.dtype == dtype
    exact = attention_with_remainder(q, k, v, blocks, block_size, SCALE, linear)
    return result, exact, attention_with_remainder(q, k, v, blocks, block_size, SCALE, linear, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [False, True])
def test_equals_its_definition(linear: bool, dtype: torch.dtype) -> None:
    result, expected, same_precision = _whole(linear, dtype)
    # The LSEs of two parts are rounded where the definition rounds one softmax.
    assert_close(result, expected, max(relative_error(same_precision, expected), 1e-15), factor=3)


@pytest.mark.parametrize("lengths", [(75, 96), (3, 5), (8, 13), (1, 12)])
def test_any_length(lengths: tuple[int, int]) -> None:
    result, expected, _ = _whole(True, torch.float64, lengths=lengths)
    assert relative_error(result, expected) < 1e-14


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _whole(True, torch.float64)[0]
    monkeypatch.setattr(attend, "_BUDGET", 1)
    monkeypatch.setattr(means, "_BUDGET", 1)
    assert relative_error(_whole(True, torch.float64)[0], whole) < 1e-15


@pytest.mark.parametrize("linear", [False, True])
def test_blocks_of_equal_tokens_are_exact(linear: bool) -> None:
    """Where a block's keys and values are all alike, its stand-in is the block itself: the result is dense attention."""
    q, k, v = random_tensors(1, 40, 40, 2, 8, 1, torch.float64)
    k, v = (x[:, ::8].repeat_interleave(8, 1) for x in (k, v))
    blocks = random_blocks((1, 2, 5, 5), 3)
    mask = BlockMask.from_dense(blocks, (8, 8), 40, 40)
    out, lse = ReferenceKernel()(q, k, v, mask, SCALE)
    result = add_remainder(out, lse, q, block_means(k, v, 8, linear), mask, SCALE)
    dense, _ = masked_attention(q, k, v, torch.ones(1, 2, 40, 40, dtype=torch.bool), SCALE)
    assert relative_error(result, dense) < 1e-14


def test_linear_is_nearer_to_dense_where_values_follow_keys() -> None:
    """What the term is for: scores small enough to expand, values that are a linear map of the keys."""
    q, k, _ = random_tensors(1, 96, 96, 2, 8, 1, torch.float64)
    q, k = q / 6, k / 6
    v = k @ torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    blocks = random_blocks((1, 2, 12, 12), 3, 0.2)
    mask = BlockMask.from_dense(blocks, (8, 8), 96, 96)
    dense, _ = masked_attention(q, k, v, torch.ones(1, 2, 96, 96, dtype=torch.bool), SCALE)
    errors = []
    for linear in (False, True):
        out, lse = ReferenceKernel()(q, k, v, mask, SCALE)
        errors.append(relative_error(add_remainder(out, lse, q, block_means(k, v, 8, linear), mask, SCALE), dense))
    dropped, _ = masked_attention(q, k, v, expand(blocks, (8, 8), 96, 96), SCALE)
    assert errors[1] < 0.5 * errors[0] < relative_error(dropped, dense)


def test_a_row_that_leaves_nothing_out_is_untouched() -> None:
    q, k, v = random_tensors(1, 32, 32, 2, 8, 1, torch.float32)
    mask = BlockMask.from_dense(torch.ones(1, 2, 4, 4, dtype=torch.bool), (8, 8), 32, 32)
    out, lse = ReferenceKernel()(q, k, v, mask, SCALE)
    assert lse is not None
    stand_ins = block_means(k, v, 8, True)
    assert torch.equal(add_remainder(out.clone(), lse, q, stand_ins, mask, SCALE), out)
    assert attend_means(q, stand_ins.tokens, stand_ins.slope, mask, SCALE)[1].eq(float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outliers_stay_finite(dtype: torch.dtype) -> None:
    """Queries and keys of which some are 300 times the others: no overflow, and still the definition's values."""
    q, k, v = random_tensors(1, 64, 64, 2, 16, 7, torch.float64)
    q[:, ::9] *= 300
    k[:, ::7] *= 300
    q, k, v = (x.to(dtype) for x in (q, k, v))
    blocks = random_blocks((1, 2, 8, 8), 3)
    mask = BlockMask.from_dense(blocks, (8, 8), 64, 64)
    out, lse = ReferenceKernel()(q, k, v, mask, SCALE)
    result = add_remainder(out, lse, q, block_means(k, v, 8, True), mask, SCALE)
    assert result.isfinite().all()
    if dtype != torch.float16:
        expected = attention_with_remainder(q, k, v, blocks, (8, 8), SCALE, True)
        same = attention_with_remainder(q, k, v, blocks, (8, 8), SCALE, True, dtype)
        assert_close(result, expected, max(relative_error(same, expected), 1e-6))


def test_density_one_has_no_remainder() -> None:
    tensors = random_tensors(1, 60, 60, 2, 8, 1, torch.float32)
    for remainder in REMAINDERS:
        config = replace(CONFIG, topk=1.0, remainder=remainder)
        with mock.patch("sp_sparse.attention.add_remainder", side_effect=AssertionError):
            out = SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=8)(*tensors, grid=(1, 6, 10))
        expected, _ = masked_attention(*tensors, torch.ones(1, 2, 60, 60, dtype=torch.bool), 8**-0.5)
        assert relative_error(out, expected) < 1e-6


def _all_gathered_by_the_caller(rank: int, remainder: str) -> None:
    config, grid = replace(CONFIG, remainder=remainder), (3, 7, 9)
    q, k, v = random_tensors(1, 189, 189, 3, 16, 4, torch.float32)
    single = SparseAttention(config, SequenceParallelMesh(), num_heads=3, head_dim=16)(q, k, v, grid=grid)
    mesh = SequenceParallelMesh(1, 3)
    layer = SparseAttention(config, mesh, num_heads=3, head_dim=16, all_gather_kv=True)
    first, last = layer.shards(grid).range_of(rank)
    out = layer(q[:, first:last], k, v, grid=grid)
    assert relative_error(out, single[:, first:last]) < 2e-6


@pytest.mark.parametrize("remainder", ["mean", "linear"])
def test_keys_gathered_by_the_caller_count_once(remainder: str) -> None:
    run_ranks(3, _all_gathered_by_the_caller, remainder)


class NoLse:
    """A kernel that says that it returns no LSE."""

    info = KernelInfo(name="no-lse", returns_lse=False)

    def missing(self) -> str | None:
        return None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        return ReferenceKernel()(query, key, value, mask, scale)[0], None


class Forgetful(NoLse):
    """One that says that it does."""

    info = KernelInfo(name="forgetful")


def test_a_kernel_without_lse_is_refused() -> None:
    config = replace(CONFIG, backend="tests.test_remainder:NoLse", remainder="linear")
    with pytest.raises(ValueError, match=r"returns no LSE, which remainder='linear' needs .*, or remainder='drop'"):
        SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=8)
    SparseAttention(replace(config, remainder="drop"), SequenceParallelMesh(), num_heads=2, head_dim=8)


def test_auto_passes_over_a_kernel_without_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AUTO_ORDER", ("tests.test_remainder:NoLse", "reference"))
    for remainder, kernel in (("drop", NoLse), ("mean", ReferenceKernel)):
        config = replace(CONFIG, backend="auto", remainder=remainder)
        layer = SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=8)
        assert type(layer.kernel_for(torch.device("cpu"), torch.float32)).__name__ == kernel.__name__


def test_a_kernel_that_returns_no_lse_against_its_word_is_refused() -> None:
    config = replace(CONFIG, backend="tests.test_remainder:Forgetful", remainder="mean")
    layer = SparseAttention(config, SequenceParallelMesh(), num_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="returned no LSE, which the remainder needs; use one that does"):
        layer(*random_tensors(1, 60, 60, 2, 8, 1, torch.float32), grid=(1, 6, 10))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="remainder='quadratic' is not known; use one of drop, mean, linear"):
        replace(CONFIG, remainder="quadratic")
