"""The Triton kernels against dense float64 attention and torch's block means: compiled on GPUs, interpreted on CPUs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sp_sparse.kernels.triton import TritonKernel
from sp_sparse.selection.summaries import block_means_torch
from tests import kernel_cases
from tests.kernel_cases import assert_same_bits, attend
from tests.triton_marks import needs_triton, on_gpu, run_interpreted
from tests.triton_means_cases import CASES, make_tokens
from tests.triton_oracle import assert_accurate, poisoned_empty, random_mask, random_problem

BLOCK_SIZES = TritonKernel.info.block_sizes
DTYPES = TritonKernel.info.dtypes


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@needs_triton
def test_under_the_interpreter() -> None:
    run_interpreted("triton_interpreted.py")


def test_importing_the_package_does_not_import_triton() -> None:
    # torch and its compiler may import triton where it is installed: they come first, and what they bring does not count.
    code = """
import sys, torch, torch._dynamo
before = set(sys.modules)
import sp_sparse, sp_sparse.kernels.triton, sp_sparse.selection.summaries, sp_sparse.parallel.merge
assert not {name for name in set(sys.modules) - before if name.split(".")[0] == "triton"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_refuses_tensors_that_do_not_fit_the_mask() -> None:
    problem = random_problem((64, 64), 64, torch.float16, "cpu", (100, 100))
    for wrong in (
        replace(problem, query=problem.query[:, 1:]),
        replace(problem, key=problem.key[:, 1:]),
        replace(problem, value=problem.value[:, :, 1:]),
        replace(problem, value=problem.value.transpose(1, 3).contiguous().transpose(1, 3)),
        replace(problem, mask=random_mask(torch.Generator(), 1, 3, (64, 64), 100, 100)),
    ):
        with pytest.raises(ValueError, match=r"mask|contiguous"):
            attend(wrong, TritonKernel())


@on_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_matches_dense(block_size: tuple[int, int], head_dim: int, dtype: torch.dtype, tma: bool) -> None:
    kernel_cases.check_matches_dense(TritonKernel(tma), block_size, head_dim, dtype)


@on_gpu
@pytest.mark.parametrize("tma", [True, False])
def test_same_bits_for_any_table_tail_and_strides(tma: bool) -> None:
    kernel_cases.check_table_tail_and_strides(TritonKernel(tma))


@on_gpu
@pytest.mark.parametrize("padding", [1, 4])
def test_falls_back_to_pointers_where_tma_cannot_address(padding: int) -> None:
    problem = random_problem((64, 64), 64, torch.float16, "cuda", (300, 300))
    padded = problem.change(lambda x: torch.nn.functional.pad(x, (0, padding))[..., :64])
    assert_same_bits(attend(padded, TritonKernel()), attend(problem, TritonKernel(tma=False)))
    shared = problem.change(lambda x: x[:1].expand(2, -1, -1, -1))
    assert_accurate(*attend(shared, TritonKernel()), shared)


@on_gpu
@pytest.mark.parametrize("tma", [True, False])
def test_any_scale(tma: bool) -> None:
    kernel_cases.check_scales(TritonKernel(tma))


@on_gpu
@pytest.mark.parametrize("tma", [True, False])
def test_values_that_are_not_attended_do_not_matter(tma: bool) -> None:
    kernel_cases.check_unattended_values(TritonKernel(tma))


@on_gpu
@pytest.mark.parametrize("tma", [True, False])
def test_ring_hops_merge_to_the_whole(tma: bool) -> None:
    kernel_cases.check_ring_hops(TritonKernel(tma))


@on_gpu
@pytest.mark.parametrize("tma", [True, False])
def test_offsets_past_32_bits(tma: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    problem = random_problem((128, 128), 128, torch.bfloat16, "cuda", (150, 300), heads=1)
    # Tokens lie 2^23 elements apart and batches more than 2^31, so that both products leave 32 bits; half a token's
    # distance keeps the batches from overlapping.
    token, batch = 1 << 23, (1 << 31) + (1 << 22)
    buffer = torch.empty(batch + 300 * token, dtype=torch.bfloat16, device="cuda")
    offsets = iter((0, 128, 256))

    def spread(x: Tensor) -> Tensor:
        return buffer.as_strided(x.shape, (batch, token, 128, 1), next(offsets)).copy_(x)

    assert_same_bits(attend(problem.change(spread), TritonKernel(tma)), attend(problem, TritonKernel(tma)))


@on_gpu
def test_empty_sizes() -> None:
    kernel_cases.check_empty_sizes(TritonKernel(), "cuda")


@on_gpu
def test_captures_in_a_graph() -> None:
    """A capture fails on a synchronisation with the host."""
    problem = random_problem((128, 128), 128, torch.bfloat16, "cuda", (500, 500))
    expected = attend(problem, TritonKernel())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(problem, TritonKernel())
    graph.replay()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@on_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("block_size", "head_dim", "length"), CASES)
def test_block_means_have_the_same_bits_everywhere(
    block_size: int, head_dim: int, length: int, dtype: torch.dtype
) -> None:
    from sp_sparse.selection.triton_means import block_means_triton, takes_tokens  # it imports triton

    x = make_tokens(length, head_dim, dtype)
    expected = block_means_torch(x, block_size).contiguous().view(torch.int32)
    for layout in (x, x.contiguous(), x.transpose(1, 2).contiguous().transpose(1, 2)):
        there = torch.empty_strided(x.shape, layout.stride(), dtype=dtype, device="cuda").copy_(layout)
        assert takes_tokens(there, block_size)
        assert torch.equal(block_means_torch(there, block_size).contiguous().cpu().view(torch.int32), expected)
        assert torch.equal(block_means_triton(there, block_size).cpu().view(torch.int32), expected)
