"""What every compiled kernel must do on a GPU: cases for the tests of one kernel each."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sp_sparse.kernels.base import Kernel
from sp_sparse.mask import BlockMask
from tests.triton_oracle import Problem, assert_accurate, random_mask, random_problem, to_device

# (query, key) lengths: both ragged, both whole blocks, a single query.
LENGTHS = ((1000, 1500), (1024, 896), (1, 2049))


def attend(problem: Problem, kernel: Kernel) -> tuple[Tensor, Tensor]:
    out, lse = kernel(problem.query, problem.key, problem.value, problem.mask, problem.scale)
    assert lse is not None
    return out, lse


def assert_same_bits(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def check_matches_dense(kernel: Kernel, block_size: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Masks differ per batch entry and head, hold an empty and a full row, and junk past the counts."""
    for lengths in LENGTHS:
        problem = random_problem(block_size, head_dim, dtype, "cuda", lengths)
        assert_accurate(*attend(problem, kernel), problem)


def check_table_tail_and_strides(kernel: Kernel) -> None:
    problem = random_problem((128, 64), 128, torch.bfloat16, "cuda", (700, 900))
    expected = attend(problem, kernel)
    mask = problem.mask
    clean = BlockMask.from_dense(mask.to_dense(), mask.block_size, mask.query_length, mask.key_length)
    assert not clean.indices.is_contiguous()
    heads_first = problem.change(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    packed = problem.change(lambda x: torch.stack((x, x, x), 3)[:, :, :, 1])
    for other in (replace(problem, mask=clean), heads_first, packed):
        assert_same_bits(attend(other, kernel), expected)


def check_scales(kernel: Kernel) -> None:
    problem = random_problem((128, 128), 128, torch.bfloat16, "cuda", (300, 500))
    for scale in (-0.05, 0.0, 1.0):
        scaled = replace(problem, query=problem.query / 8, scale=scale)
        assert_accurate(*attend(scaled, kernel), scaled)


def check_unattended_values(kernel: Kernel) -> None:
    problem = random_problem((64, 128), 128, torch.bfloat16, "cuda", (300, 500))
    expected = attend(problem, kernel)
    # A buffer longer than the keys, as a ring reuses for shards of different lengths, holds NaN past their end.
    keys = ("key", "value")
    longer = problem.change(lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 50), value=math.nan)[:, :500], keys)
    assert_same_bits(attend(longer, kernel), expected)
    dense = problem.mask.to_dense()
    dense[..., 1] = False
    without = replace(problem, mask=BlockMask.from_dense(dense, (64, 128), 300, 500))
    poisoned = without.change(lambda x: x.index_fill(1, torch.arange(128, 256, device="cuda"), math.nan), keys)
    assert_same_bits(attend(poisoned, kernel), attend(without, kernel))


def check_ring_hops(kernel: Kernel) -> None:
    problem = random_problem((64, 64), 128, torch.bfloat16, "cuda", (500, 700))
    edges = (0, 192, 192, 448, 700)
    outs, lses = [], []
    for mask, start, stop in zip(problem.mask.split_keys(edges), edges[:-1], edges[1:], strict=True):
        hop = replace(problem, key=problem.key[:, start:stop], value=problem.value[:, start:stop], mask=mask)
        out, lse = attend(hop, kernel)
        outs.append(out.double())
        lses.append(lse.double())
    total = torch.stack(lses).logsumexp(0)
    weights = (torch.stack(lses) - total.masked_fill(total.isinf(), 0.0)).exp().transpose(2, 3).unsqueeze(-1)
    merged = (torch.stack(outs) * weights).sum(0).to(torch.bfloat16)
    assert_accurate(merged, total.float(), problem)


def check_all_rows_empty(kernel: Kernel) -> None:
    problem = random_problem((128, 128), 128, torch.bfloat16, "cuda", (300, 500))
    out, lse = attend(replace(problem, mask=replace(problem.mask, counts=problem.mask.counts * 0)), kernel)
    assert out.eq(0).all()
    assert lse.eq(float("-inf")).all()


def check_empty_sizes(kernel: Kernel, device: str) -> None:
    """No queries, no keys, no heads: answered without a launch, so on any device."""
    full = to_device(random_mask(torch.Generator(), 1, 2, (64, 64), 70, 70), device)
    no_queries = replace(full, indices=full.indices[:, :, :0], counts=full.counts[:, :, :0], query_length=0)
    no_keys = replace(full, indices=full.indices[..., :0], counts=full.counts * 0, key_length=0)
    no_heads = replace(full, indices=full.indices[:, :0], counts=full.counts[:, :0])
    for mask in (no_queries, no_keys, no_heads):
        heads = mask.counts.shape[1]
        query, key = (
            torch.ones(1, n, heads, 64, dtype=torch.float16, device=device)
            for n in (mask.query_length, mask.key_length)
        )
        out, lse = kernel(query, key, key, mask, 1.0)
        assert out.shape == query.shape
        assert out.eq(0).all()
        assert lse is not None
        assert lse.shape == (1, heads, mask.query_length)
        assert lse.eq(float("-inf")).all()
