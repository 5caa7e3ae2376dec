"""FlashInfer: its tables and calls with a stand-in on any device, its results on a GPU against dense float64 attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_sparse.kernels import flashinfer as module
from sp_sparse.kernels.flashinfer import FlashInferKernel, page_table, to_pages
from tests import kernel_cases
from tests.kernel_cases import LENGTHS, attend
from tests.triton_oracle import dense_attention, poisoned_empty, random_mask, random_problem

KERNEL = FlashInferKernel()
BLOCK_SIZES = FlashInferKernel.info.block_sizes


def on_gpu(test):  # type: ignore[no-untyped-def]
    """Mark a test that launches the kernel."""
    able = torch.cuda.is_available() and (8, 0) <= torch.cuda.get_device_capability() <= (9, 0)
    reason = KERNEL.missing() if able else "needs a GPU of compute capability 8.0 to 9.0"
    # The first call for a dtype and head dimension compiles.
    test = pytest.mark.timeout(900)(test)
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


class PlainWrapper:
    """Stands in for FlashInfer's wrapper: attends request by request, in plain torch."""

    def __init__(self, workspace: Tensor, layout: str, backend: str) -> None:
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "fa3")
        self.plans = 0
        self.fails = False

    def plan(
        self, query_starts: Tensor, page_starts: Tensor, pages: Tensor, last_page_lengths: Tensor, **options: Any
    ) -> None:
        if self.fails:
            raise RuntimeError("no plan")
        for table in (query_starts, page_starts, pages, last_page_lengths):
            assert table.dtype == torch.int32
        assert (options["num_qo_heads"], options["num_kv_heads"], options["causal"]) == (1, 1, False)
        assert options["q_data_type"] == options["kv_data_type"]
        self.table = query_starts.tolist(), page_starts.tolist(), pages, last_page_lengths.tolist()
        self.options = options
        self.plans += 1

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor], out: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
        assert return_lse
        query_starts, page_starts, numbers, last_page_lengths = self.table
        lse = torch.empty(query.shape[:2])
        for request, last in enumerate(last_page_lengths):
            rows = slice(query_starts[request], query_starts[request + 1])
            listed = numbers[page_starts[request] : page_starts[request + 1]].long()
            length = max(len(listed) - 1, 0) * self.options["page_size"] + last
            key, value = (x[listed].flatten(0, 1)[:length, 0].double() for x in pages)
            scores = query[rows, 0].double() @ key.T * self.options["sm_scale"]
            lse[rows, 0] = scores.logsumexp(-1).float() / math.log(2)
            out[rows, 0] = (scores.softmax(-1) @ value).to(out.dtype)
        return out, lse


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package: Any = ModuleType("flashinfer")
    package.BatchPrefillWithPagedKVCacheWrapper = PlainWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    module._planner.cache_clear()
    yield
    module._planner.cache_clear()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tables_hold_the_mask(block_size: tuple[int, int], lengths: tuple[int, int]) -> None:
    mask = random_mask(torch.Generator().manual_seed(0), 2, 3, block_size, *lengths)
    table, dense = page_table(mask), mask.to_dense()
    key_blocks, request = mask.num_key_blocks, 0
    tail = lengths[1] - (key_blocks - 1) * block_size[1]
    for b in range(2):
        for h in range(3):
            for i in range(mask.num_query_blocks):
                attended = dense[b, h, i].nonzero().flatten().tolist()
                start, stop = table.page_starts[request : request + 2].tolist()
                assert table.pages[start:stop].tolist() == [(b * 3 + h) * key_blocks + j for j in attended]
                assert table.query_starts[request] == (b * 3 + h) * lengths[0] + i * block_size[0]
                last = 0 if not attended else tail if attended[-1] == key_blocks - 1 else block_size[1]
                assert table.last_page_lengths[request] == last
                request += 1
    assert table.query_starts[request] == 6 * lengths[0]
    assert len(table.query_starts) == len(table.page_starts) == request + 1
    assert len(table.last_page_lengths) == request
    assert table.page_starts[request] == len(table.pages) == dense.sum()


@pytest.mark.parametrize("length", [64, 100, 128])
def test_pages_hold_the_blocks_of_a_head(length: int) -> None:
    x = torch.randn(2, length, 3, 64)
    pages = to_pages(x, 64)
    blocks = -(-length // 64)
    assert pages.shape == (6 * blocks, 64, 1, 64)
    for page in range(len(pages)):
        head, block = divmod(page, blocks)
        expected = x[head // 3, block * 64 : (block + 1) * 64, head % 3]
        assert torch.equal(pages[page, : len(expected), 0], expected)
        assert pages[page, len(expected) :].eq(0).all()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("scale", [0.1, 0.0, -0.1])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_call_means_the_mask(block_size: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    for lengths in ((300, 500), (256, 384), (1, 130)):
        problem = replace(random_problem(block_size, 64, torch.bfloat16, "cpu", lengths), scale=scale)
        out, lse = attend(problem, KERNEL)
        expected, expected_lse = dense_attention(problem, torch.float64)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
def test_a_plan_is_reused_for_its_mask_only() -> None:
    problem = random_problem((64, 64), 64, torch.bfloat16, "cpu", (100, 100))
    wrapper: Any = KERNEL.plan(problem.query, problem.mask, 1.0)
    for _ in range(2):
        assert FlashInferKernel().plan(problem.query, problem.mask, 1.0) is wrapper
        assert wrapper.plans == 1
    same = replace(problem.mask)
    KERNEL.plan(problem.query, same, 1.0)
    assert wrapper.plans == 2
    KERNEL.plan(problem.query, same, 0.5)
    KERNEL.plan(problem.query.half(), same, 0.5)
    assert wrapper.plans == 4
    wrapper.fails = True
    with pytest.raises(RuntimeError, match="no plan"):
        KERNEL.plan(problem.query, problem.mask, 1.0)
    wrapper.fails = False
    KERNEL.plan(problem.query.half(), same, 0.5)
    assert wrapper.plans == 5
    del same
    assert module._planner(problem.query.device, 0, "fa3")._mask() is None  # type: ignore[misc]


def test_nothing_to_attend() -> None:
    kernel_cases.check_empty_sizes(KERNEL, "cpu")


@on_gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_matches_dense(
    block_size: tuple[int, int], head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    kernel_cases.check_matches_dense(KERNEL, block_size, head_dim, dtype)


@on_gpu
def test_same_bits_for_any_table_tail_and_strides() -> None:
    kernel_cases.check_table_tail_and_strides(KERNEL)


@on_gpu
def test_any_scale() -> None:
    kernel_cases.check_scales(KERNEL)


@on_gpu
def test_values_that_are_not_attended_do_not_matter() -> None:
    kernel_cases.check_unattended_values(KERNEL)


@on_gpu
def test_ring_hops_merge_to_the_whole() -> None:
    kernel_cases.check_ring_hops(KERNEL)


@on_gpu
def test_rows_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    kernel_cases.check_all_rows_empty(KERNEL)


@on_gpu
def test_masks_that_take_turns() -> None:
    problems = [random_problem((128, 128), 128, torch.bfloat16, "cuda", (900, 700), seed=seed) for seed in range(3)]
    first = [attend(problem, KERNEL) for problem in problems]
    for problem, expected in zip(problems, first, strict=True):
        kernel_cases.assert_same_bits(attend(problem, KERNEL), expected)
