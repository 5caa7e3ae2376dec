"""The Triton kernels on the CPU, under Triton's interpreter; `test_triton.py` runs this file with TRITON_INTERPRET=1.

Attention is tested in fp16 alone: the interpreter multiplies the bits of bf16 matrices instead of their values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sp_sparse.kernels.triton import TritonKernel
from sp_sparse.selection.summaries import block_means_torch
from sp_sparse.selection.triton_means import block_means_triton, takes_tokens
from tests.triton_marks import skip_without_interpreter
from tests.triton_means_cases import CASES, make_tokens
from tests.triton_oracle import Problem, assert_accurate, poisoned_empty, random_mask, random_problem

skip_without_interpreter()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def check(problem: Problem, kernel: TritonKernel) -> None:
    assert_accurate(*kernel(problem.query, problem.key, problem.value, problem.mask, problem.scale), problem)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", TritonKernel.info.block_sizes)
def test_matches_dense(block_size: tuple[int, int], head_dim: int, tma: bool) -> None:
    check(random_problem(block_size, head_dim, torch.float16, "cpu", (200, 330), batch=1, heads=2), TritonKernel(tma))


def test_whole_blocks() -> None:
    check(random_problem((64, 64), 64, torch.float16, "cpu", (128, 256)), TritonKernel())


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.0])
def test_any_scale(scale: float) -> None:
    problem = random_problem((64, 64), 64, torch.float16, "cpu", (70, 150), batch=1)
    check(replace(problem, query=problem.query / 8, scale=scale), TritonKernel())


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(0, 2, 70, 70), (1, 0, 70, 70), (1, 2, 0, 70), (1, 2, 70, 0)]
)
def test_empty_sizes(batch: int, heads: int, queries: int, keys: int) -> None:
    mask = random_mask(torch.Generator(), batch, max(heads, 1), (64, 64), max(queries, 1), keys)
    rows = -(-queries // 64)
    mask = replace(
        mask, indices=mask.indices[:, :heads, :rows], counts=mask.counts[:, :heads, :rows], query_length=queries
    )
    query, key = torch.ones(batch, queries, heads, 64).half(), torch.ones(batch, keys, heads, 64).half()
    out, lse = TritonKernel()(query, key, key, mask, 1.0)
    assert out.shape == query.shape
    assert out.eq(0).all()
    assert lse is not None
    assert lse.shape == (batch, heads, queries)
    assert lse.eq(float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("block_size", "head_dim", "length"), CASES)
def test_block_means_equal_torch_bit_for_bit(block_size: int, head_dim: int, length: int, dtype: torch.dtype) -> None:
    x = make_tokens(length, head_dim, dtype)
    assert takes_tokens(x, block_size)
    expected = block_means_torch(x, block_size).contiguous()
    assert torch.equal(block_means_triton(x, block_size).view(torch.int32), expected.view(torch.int32))
