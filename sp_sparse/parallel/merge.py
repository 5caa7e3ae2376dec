"""Merging attention over disjoint sets of keys by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Safe where a side saw no key (`-inf`): its weight is 0, and a row that neither side reaches stays 0 with `-inf`.
    (The online softmax of arXiv 1805.02867 across devices, as in ring attention, arXiv 2310.01889.)

    Args:
        out: `[B, S, H, D]` fp32 or fp64; overwritten.
        lse: `[B, H, S]`, natural log.
        new_out: `[B, S, H, D]`, any float dtype.
        new_lse: `[B, H, S]`.

    Returns:
        The merged out, which is the storage of `out`, and lse.
    """
    total = torch.logaddexp(lse, new_lse)
    # exp(-inf - finite) = 0 is right; only (-inf) - (-inf) is NaN, where neither side saw a key.
    floor = torch.where(total == float("-inf"), 0.0, total)
    weight, new_weight = ((side - floor).exp().transpose(1, 2).unsqueeze(-1) for side in (lse, new_lse))
    return out.mul_(weight).addcmul_(new_out.to(out.dtype), new_weight), total
