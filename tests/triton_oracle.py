"""Inputs for tests of block-sparse kernels, and what they are compared with: dense masked attention in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sp_sparse.mask import BlockMask, num_blocks


@dataclass(frozen=True)
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    scale: float

    def change(self, function: Callable[[Tensor], Tensor], names: Sequence[str] = ("query", "key", "value")) -> Problem:
        """The same problem with `function` applied to the tensors called `names`."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **tensors)


def random_mask(
    generator: torch.Generator,
    batch: int,
    heads: int,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
    density: float = 0.4,
) -> BlockMask:
    """A mask that differs per batch and head, with an empty and a full row, and other valid numbers past the counts."""
    rows, columns = num_blocks(query_length, block_size[0]), num_blocks(key_length, block_size[1])
    dense = torch.rand(batch, heads, rows, columns, generator=generator) < density
    dense[:, 0, 0] = False
    dense[:, -1, -1] = True
    mask = BlockMask.from_dense(dense, block_size, query_length, key_length)
    used = torch.arange(columns) < mask.counts.unsqueeze(-1)
    junk = torch.randint(0, max(columns, 1), mask.indices.shape, generator=generator, dtype=torch.int32)
    return BlockMask(torch.where(used, mask.indices, junk), mask.counts, block_size, query_length, key_length)


def random_problem(
    block_size: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    lengths: tuple[int, int],
    batch: int = 2,
    heads: int = 3,
    seed: int = 0,
) -> Problem:
    """Queries and keys are three times a normal variable, so that a few keys hold most of the weight."""
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(generator, batch, heads, block_size, *lengths)
    query, key, value = (
        (torch.randn(batch, length, heads, head_dim, generator=generator) * size).to(device, dtype)
        for length, size in ((lengths[0], 3.0), (lengths[1], 3.0), (lengths[1], 1.0))
    )
    return Problem(query, key, value, to_device(mask, device), 1 / math.sqrt(head_dim))


def to_device(mask: BlockMask, device: str) -> BlockMask:
    return BlockMask(
        mask.indices.to(device), mask.counts.to(device), mask.block_size, mask.query_length, mask.key_length
    )


def dense_attention(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention under the expanded mask, all arithmetic in `dtype`: out `[B, Sq, H, D]`, lse `[B, H, Sq]`."""
    mask = problem.mask
    blocks = mask.to_dense()
    rows = torch.arange(mask.query_length, device=blocks.device) // mask.block_size[0]
    columns = torch.arange(mask.key_length, device=blocks.device) // mask.block_size[1]
    out = torch.zeros(problem.query.shape, dtype=dtype, device=blocks.device)
    lse = torch.empty(*blocks.shape[:2], mask.query_length, dtype=dtype, device=blocks.device)
    for b in range(blocks.shape[0]):
        for h in range(blocks.shape[1]):
            attended = blocks[b, h][rows][:, columns]
            scores = (problem.query[b, :, h].to(dtype) @ problem.key[b, :, h].to(dtype).T) * problem.scale
            scores = scores.masked_fill(~attended, float("-inf"))
            lse[b, h] = scores.logsumexp(-1)
            weights = scores.softmax(-1).masked_fill(~attended.any(-1, keepdim=True), 0.0)
            out[b, :, h] = weights @ problem.value[b, :, h].to(dtype)
    return out, lse


def assert_accurate(out: Tensor, lse: Tensor | None, problem: Problem) -> None:
    """No worse than twice the error of dense attention in the inputs' precision, both measured against float64."""
    exact, exact_lse = dense_attention(problem, torch.float64)
    peer = dense_attention(problem, problem.query.dtype)[0]
    assert out.shape == exact.shape
    assert out.dtype == problem.query.dtype
    error, peer_error = out.double() - exact, peer.double() - exact
    norm = exact.square().mean().sqrt()
    epsilon = torch.finfo(out.dtype).eps
    assert error.abs().max() <= 2 * peer_error.abs().max() + epsilon * 1e-3
    assert error.square().mean().sqrt() <= 2 * peer_error.square().mean().sqrt() + norm * 1e-6
    assert error.square().mean().sqrt() <= epsilon * norm
    assert lse is not None
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.empty` whose floats are NaN: what a kernel leaves unwritten shows."""
    tensor = _empty(*args, **kwargs)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


_empty = torch.empty
