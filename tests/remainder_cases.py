"""Inputs of the remainder's tests, and what its Triton kernels must come to, on GPUs and under the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sp_sparse import BlockMask
from sp_sparse.remainder.means import block_means_torch
from sp_sparse.remainder.triton_attend import add_remainder_triton
from sp_sparse.remainder.triton_means import block_means_triton
from tests.cases import poisoned, random_blocks, random_tensors
from tests.oracle import expand, masked_attention, relative_error
from tests.remainder_oracle import attention_with_remainder


@dataclass(frozen=True)
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Tensor
    mask: BlockMask
    scale: float


def problem(
    block_size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    queries: int,
    keys: int,
    batch: int = 2,
    heads: int = 2,
) -> Case:
    """Keys share a direction and values follow them, so that means and the linear term matter.

    Some rows of the mask choose nothing and some everything; table entries past the counts are junk.
    """
    q, k, v = random_tensors(batch, queries, keys, heads, head_dim, keys + head_dim, torch.float64)
    v = v + 0.3 * k.roll(1, -1) + 0.5
    q, k, v = ((x * size).to(device, dtype) for x, size in ((q, 0.5), (k, 0.4), (v, 1.0)))
    rows, columns = -(-queries // block_size[0]), -(-keys // block_size[1])
    blocks = random_blocks((batch, heads, rows, columns), keys)
    mask = poisoned(BlockMask.from_dense(blocks, block_size, queries, keys), 0)
    mask = BlockMask(mask.indices.to(device), mask.counts.to(device), block_size, queries, keys)
    return Case(q, k, v, blocks, mask, head_dim**-0.5)


def means_like(case: Case, linear: bool) -> None:
    """The means and the slope are those of torch in float64, to the rounding of the dtype."""
    block = case.mask.block_size[1]
    tokens, slope = block_means_triton(case.key, case.value, block, linear)
    exact, exact_slope = block_means_torch(case.key.double(), case.value.double(), block, linear)
    epsilon = torch.finfo(case.key.dtype).eps
    assert tokens.dtype == case.key.dtype
    assert relative_error(tokens, exact) <= epsilon
    assert (slope is None) == (exact_slope is None)
    if slope is not None and exact_slope is not None:
        assert slope.dtype == torch.float32
        assert relative_error(slope, exact_slope) <= epsilon


def fused(case: Case, linear: bool, compare: bool = True, tma: bool = True) -> Tensor:
    """What the kernels make of it, no further from float64 than twice what torch makes in the dtype of the inputs."""
    q, k, v, mask = case.query, case.key, case.value, case.mask
    tokens, slope = block_means_triton(k, v, mask.block_size[1], linear)
    if slope is not None:
        slope *= case.scale / mask.key_length
    chosen = expand(case.blocks, mask.block_size, mask.query_length, mask.key_length).to(q.device)
    exact_part, lse = masked_attention(q, k, v, chosen, case.scale, torch.float32)
    out = add_remainder_triton(exact_part.to(q.dtype), lse.float(), q, tokens, slope, mask, case.scale, tma)
    if compare:
        cpu = q.cpu(), k.cpu(), v.cpu()
        expected = attention_with_remainder(*cpu, case.blocks, mask.block_size, case.scale, linear)
        same = attention_with_remainder(*cpu, case.blocks, mask.block_size, case.scale, linear, q.dtype)
        limit = 2 * max(relative_error(same, expected), torch.finfo(q.dtype).eps / 4)
        assert relative_error(out.cpu(), expected) <= limit
        without = masked_attention(*cpu, chosen.cpu(), case.scale)[0]
        assert relative_error(without, expected) > 10 * limit, "the remainder matters too little to be seen"
        # A row that leaves nothing out is as it was.
        full = expand(case.blocks, mask.block_size, mask.query_length, mask.key_length).all(-1).transpose(1, 2)
        assert torch.equal(out.cpu()[full], exact_part.to(q.dtype).cpu()[full])
    return out
