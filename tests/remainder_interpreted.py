"""The remainder's Triton kernels on the CPU, under Triton's interpreter; `test_remainder.py` runs this file.

In fp16 alone: the interpreter multiplies the bits of bf16 matrices instead of their values.
"""

from __future__ import annotations

import pytest
import torch

from sp_sparse.remainder import triton_attend
from sp_sparse.remainder.attend import attend_means
from sp_sparse.remainder.means import block_means_torch
from sp_sparse.remainder.triton_attend import takes_query
from sp_sparse.remainder.triton_means import block_means_triton, takes_tokens
from tests.remainder_cases import fused, means_like, problem
from tests.triton_marks import skip_without_interpreter
from tests.triton_oracle import poisoned_empty

skip_without_interpreter()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("block_size", "length"), [((64, 64), 330), ((128, 32), 300), ((256, 128), 600)])
def test_matches_torch(block_size: tuple[int, int], length: int, head_dim: int, linear: bool, tma: bool) -> None:
    case = problem(block_size, head_dim, torch.float16, "cpu", length, length + 70, batch=1, heads=2)
    assert takes_query(case.query, case.query, case.mask)
    assert takes_tokens(case.key, case.value, block_size[1])
    means_like(case, linear)
    fused(case, linear, tma=tma)


def test_slices_of_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long sequence takes several launches, each with a map of its own rows."""
    case = problem((64, 64), 64, torch.float16, "cpu", 330, 400)
    monkeypatch.setattr(triton_attend, "_BUDGET", 2 * 2 * 2 * 7)
    fused(case, True)


def test_outliers() -> None:
    """Neither scores nor sums overflow where some tokens are 300 times the others, nor do outputs become inf."""
    case = problem((64, 64), 64, torch.float16, "cpu", 200, 200, batch=1)
    case.query[:, ::17] *= 300
    case.key[:, ::13] *= 300
    case.value[:] *= 1000
    out = fused(case, True, compare=False)
    assert out.isfinite().all()
    assert out.abs().max() == torch.finfo(torch.float16).max, "nothing would have overflowed"


def test_short_and_empty_sequences() -> None:
    key = torch.ones(1, 0, 2, 64, dtype=torch.float16)
    tokens, slope = block_means_triton(key, key, 64, True)
    assert tokens.shape == (1, 2, 0, 2, 64)
    assert slope is not None
    assert not slope.any()
    case = problem((64, 64), 64, torch.float16, "cpu", 3, 5, batch=1)
    fused(case, True)
    means, _ = block_means_torch(case.key, case.value, 64, True)
    _, lse = attend_means(case.query, means, None, case.mask, 0.1)
    assert lse.shape == (1, 2, 3)
