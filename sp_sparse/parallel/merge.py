"""Merging attention over disjoint sets of keys by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on


def merge(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Safe where a side saw no key (`-inf`): its weight is 0, and a row that neither side reaches stays 0 with `-inf`.
    (The online softmax of arXiv 1805.02867 across devices, as in ring attention, arXiv 2310.01889.)

    Args:
        out: `[B, S, H, D]`, any float dtype; may be overwritten.
        lse: `[B, H, S]`, natural log, fp32 or fp64: the precision of the arithmetic.
        new_out: `[B, S, H, D]`, any float dtype.
        new_lse: `[B, H, S]`.
        dtype: of the merged out; by default that of `lse`. The last merge of several can so give the final dtype.

    Returns:
        The merged out and lse.
    """
    dtype = dtype or lse.dtype
    if triton_runs_on(out.device) and lse.dtype == torch.float32 and out.stride(3) == new_out.stride(3) == 1:
        from sp_sparse.parallel.triton_merge import HEAD_DIMS, merge_triton

        if out.shape[3] in HEAD_DIMS:
            return merge_triton(out, lse, new_out, new_lse, dtype)
    return merge_torch(out, lse, new_out, new_lse, dtype)


class PartialResults:
    """Attention over one disjoint set of keys after another, merged as it comes.

    Between sets the output is in the precision of the LSE; the last merge writes the final dtype.
    """

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        """`count` results will come; `dtype` is that of the merged output."""
        self._remaining, self._dtype = count, dtype
        self._merged: tuple[Tensor, Tensor] | None = None

    def add(self, out: Tensor, lse: Tensor | None) -> None:
        """One more: out `[B, S, H, D]` and lse `[B, H, S]`; out may be overwritten.

        Raises:
            ValueError: no LSE, without which nothing can be merged.
        """
        if lse is None:
            raise ValueError("the kernel returned no LSE, which ring parallelism needs; use one that does")
        self._remaining -= 1
        if self._merged is None:
            self._merged = out, lse
        else:
            self._merged = merge(*self._merged, out, lse, dtype=None if self._remaining else self._dtype)

    @property
    def out(self) -> Tensor:
        """Attention over all of them, `[B, S, H, D]`.

        Raises:
            ValueError: none came.
        """
        return self._all()[0].to(self._dtype)

    @property
    def lse(self) -> Tensor:
        """Its log-sum-exp, `[B, H, S]`."""
        return self._all()[1]

    def _all(self) -> tuple[Tensor, Tensor]:
        if self._merged is None:
            raise ValueError("every shard of the ring is empty; there is nothing to attend")
        return self._merged


def merge_torch(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`merge` in plain torch, on any device."""
    total = torch.logaddexp(lse, new_lse)
    # exp(-inf - finite) = 0 is right; only (-inf) - (-inf) is NaN, where neither side saw a key.
    floor = torch.where(total == float("-inf"), 0.0, total)
    weight, new_weight = ((side - floor).exp().transpose(1, 2).unsqueeze(-1) for side in (lse, new_lse))
    merged = out.to(lse.dtype).mul_(weight).addcmul_(new_out.to(lse.dtype), new_weight)
    return merged.to(dtype), total
