"""The reference kernel: block-sparse attention in plain torch on any device, with an exact LSE.

It gathers, for a slice of query blocks at a time, only the key blocks that they attend, so its cost falls with the
density. It is the default on CPUs and what the other kernels are compared with; the tests compare it, in turn, with
dense attention in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_sparse.device import without_autocast
from sp_sparse.kernels.base import KernelInfo
from sp_sparse.mask import BlockMask

# Elements of the largest temporary: bounds the memory of a slice of query blocks.
_BUDGET = 1 << 24


class ReferenceKernel:
    """Scores and sums are computed in fp32 (fp64 for fp64 inputs)."""

    info = KernelInfo(name="reference")

    def missing(self) -> str | None:
        return None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        with without_autocast(query.device):
            return self._attend(query, key, value, mask, scale)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, query_length, heads, head_dim = query.shape
        compute = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.zeros(
            batch, heads, mask.num_query_blocks, mask.block_size[0], head_dim, dtype=compute, device=query.device
        )
        lse = torch.full(out.shape[:-1], float("-inf"), dtype=compute, device=query.device)
        width = mask.indices.shape[3]
        if width and out.numel():
            q = _blocks(query, mask.block_size[0], compute).flatten(0, 2) * scale
            k = _blocks(key, mask.block_size[1], compute)
            v = _blocks(value, mask.block_size[1], compute)
            tables = _Tables(mask)
            rows = max(1, _BUDGET // (width * mask.block_size[1] * max(head_dim, mask.block_size[0])))
            for start in range(0, q.shape[0], rows):
                part = slice(start, start + rows)
                out.view(-1, *out.shape[3:])[part], lse.view(-1, lse.shape[3])[part] = _attend_rows(
                    q[part], k.flatten(0, 2), v.flatten(0, 2), tables.source[part], tables.valid[part]
                )
        out = out.flatten(2, 3)[:, :, :query_length].transpose(1, 2)
        return out.to(query.dtype).contiguous(), lse.flatten(2, 3)[:, :, :query_length].contiguous()


class _Tables:
    """Per row: which rows of the flattened key blocks to load, and which of their tokens count."""

    def __init__(self, mask: BlockMask) -> None:
        batch, heads, _, width = mask.indices.shape
        size, device = mask.block_size[1], mask.indices.device
        head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
        used = torch.arange(width, device=device) < mask.counts.unsqueeze(-1)
        token = mask.indices.unsqueeze(-1) * size + torch.arange(size, device=device)
        valid = used.unsqueeze(-1) & (token < mask.key_length)
        self.source = (head * mask.num_key_blocks + mask.indices).flatten(0, 2)
        self.valid = valid.flatten(0, 2).flatten(1, 2)


def _blocks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, N, size, D]`, the last block padded with zeros."""
    x = F.pad(x.transpose(1, 2).to(dtype), (0, 0, 0, -x.shape[1] % size))
    return x.unflatten(2, (x.shape[2] // size, size))


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, source: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    k = key[source].flatten(1, 2)
    # Weights of 0 do not silence a NaN or inf in a key block that is loaded but not attended.
    v = value[source].flatten(1, 2).masked_fill(~valid.unsqueeze(2), 0.0)
    scores = (query @ k.transpose(1, 2)).masked_fill(~valid.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(-1)
    # A row without keys has lse = -inf; subtracting 0 instead keeps its weights exp(-inf) = 0, not NaN.
    weights = (scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1)).exp()
    return weights @ v, lse
