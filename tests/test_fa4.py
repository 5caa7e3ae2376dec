"""FlashAttention-4: its tables on any device, its results on a GPU against dense float64 attention."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sp_sparse.kernels.fa4 import FA4Kernel, block_lists
from sp_sparse.mask import BlockMask
from tests import kernel_cases
from tests.kernel_cases import attend
from tests.triton_oracle import poisoned_empty, random_mask, random_problem

KERNEL = FA4Kernel()


def on_hopper(test):  # type: ignore[no-untyped-def]
    """Mark a test that launches the kernel."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    reason = KERNEL.missing() if able else "needs a GPU of compute capability 9.0"
    return pytest.mark.gpu(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


@pytest.mark.parametrize("lengths", [(1000, 1500), (1, 2049), (256, 64)])
@pytest.mark.parametrize("block_size", FA4Kernel.info.block_sizes)
def test_lists_hold_the_mask(block_size: tuple[int, int], lengths: tuple[int, int]) -> None:
    mask = random_mask(torch.Generator().manual_seed(0), 2, 3, block_size, *lengths)
    lists = block_lists(mask)
    full = BlockMask(lists["full_block_idx"], lists["full_block_cnt"], block_size, *lengths)
    assert torch.equal(full.to_dense(), mask.to_dense())
    assert lists["mask_block_cnt"].shape == mask.counts.shape
    assert lists["mask_block_cnt"].eq(0).all()
    assert lists["mask_block_idx"].shape == (*mask.counts.shape, 1)
    for table in lists.values():
        assert table.dtype == torch.int32
        assert table.stride(-1) == 1


def test_lists_are_copied_only_where_their_last_stride_is_not_one() -> None:
    mask = random_mask(torch.Generator(), 2, 3, (64, 64), 300, 500)
    first, second = block_lists(mask), block_lists(replace(mask))
    assert first["full_block_idx"] is mask.indices
    assert first["mask_block_cnt"] is second["mask_block_cnt"]
    turned = replace(mask, indices=mask.indices.transpose(2, 3).contiguous().transpose(2, 3))
    table = block_lists(turned)["full_block_idx"]
    assert table.stride(3) == 1
    assert torch.equal(table, mask.indices)


def test_nothing_to_attend() -> None:
    kernel_cases.check_empty_sizes(KERNEL, "cpu")


def test_refuses_tensors_that_do_not_fit_the_mask() -> None:
    problem = random_problem((64, 64), 64, torch.float16, "cpu", (100, 100))
    for wrong in (replace(problem, key=problem.key[:, 1:]), replace(problem, value=problem.value[:, :, 1:])):
        with pytest.raises(ValueError, match="mask"):
            attend(wrong, KERNEL)


def test_loading_the_kernel_does_not_import_the_package() -> None:
    code = """
import sys
from sp_sparse.kernels.registry import load_kernel
load_kernel("fa4"), load_kernel("flashinfer")
assert not {"flash_attn", "cutlass", "flashinfer"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@on_hopper
def test_the_package_takes_what_the_kernel_passes() -> None:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    parameters = inspect.signature(flash_attn_func).parameters
    assert {"softmax_scale", "block_sparse_tensors", "return_lse"} <= set(parameters)
    lists = block_lists(random_mask(torch.Generator(), 1, 1, (64, 64), 64, 64))
    assert {*lists, "block_size"} <= set(BlockSparseTensorsTorch._fields)


@on_hopper
@pytest.mark.parametrize("dtype", FA4Kernel.info.dtypes)
@pytest.mark.parametrize("head_dim", FA4Kernel.info.head_dims)
@pytest.mark.parametrize("block_size", FA4Kernel.info.block_sizes)
def test_matches_dense(
    block_size: tuple[int, int], head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    kernel_cases.check_matches_dense(KERNEL, block_size, head_dim, dtype)


@on_hopper
def test_same_bits_for_any_table_tail_and_strides() -> None:
    kernel_cases.check_table_tail_and_strides(KERNEL)


@on_hopper
def test_copies_what_the_package_cannot_address() -> None:
    problem = random_problem((64, 64), 64, torch.float16, "cuda", (300, 300))
    padded = problem.change(lambda x: torch.nn.functional.pad(x, (0, 1))[..., :64])
    kernel_cases.assert_same_bits(attend(padded, KERNEL), attend(problem, KERNEL))


@on_hopper
def test_any_scale() -> None:
    kernel_cases.check_scales(KERNEL)


@on_hopper
def test_values_that_are_not_attended_do_not_matter() -> None:
    kernel_cases.check_unattended_values(KERNEL)


@on_hopper
def test_ring_hops_merge_to_the_whole() -> None:
    kernel_cases.check_ring_hops(KERNEL)


@on_hopper
def test_rows_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    kernel_cases.check_all_rows_empty(KERNEL)


@on_hopper
def test_captures_in_a_graph() -> None:
    """A capture fails on a synchronisation with the host. Another shape than before: its zeros are made within."""
    attend(random_problem((128, 128), 128, torch.bfloat16, "cuda", (300, 300)), KERNEL)
    problem = random_problem((128, 128), 128, torch.bfloat16, "cuda", (900, 500))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(problem, KERNEL)
    graph.replay()
    kernel_cases.assert_same_bits((out, lse), attend(problem, KERNEL))


@on_hopper
def test_has_no_gradient() -> None:
    problem = random_problem((64, 64), 64, torch.bfloat16, "cuda", (100, 100))
    out, _ = attend(problem.change(lambda x: x.requires_grad_()), KERNEL)
    assert not out.requires_grad
