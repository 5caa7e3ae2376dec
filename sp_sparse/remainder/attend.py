"""The remainder: the key blocks that a mask leaves out, approximated and merged into the exact output.

For a query row `q` with scale `s`, a block `j` of `n_j` keys that its mask leaves out, with mean key `k_j` and mean value
`v_j`, counts as `n_j` keys at `k_j` with the value `v_j` (the zeroth order of PISA, arXiv 2602.01077, and of Sol-Attn,
arXiv 2607.24027). The linear term adds `s q C` to their output, the first order of the values' dependence on the keys
within a block, `C` the mean over all tokens of `(k - k_j)^T v`, one matrix a head (PISA).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sp_sparse.device import triton_runs_on, without_autocast
from sp_sparse.mask import BlockMask
from sp_sparse.parallel.merge import merge
from sp_sparse.remainder.means import BlockMeans

# Elements of the largest temporary: bounds the memory of a slice of query blocks.
_BUDGET = 1 << 24


def add_remainder(
    out: Tensor, lse: Tensor | None, query: Tensor, means: BlockMeans, mask: BlockMask, scale: float
) -> Tensor:
    """The output with what the mask leaves out; a row that leaves nothing out keeps its own.

    Args:
        out: attention under the mask, `[B, Sq, H, D]`; may be overwritten.
        lse: its LSE, natural log, `[B, H, Sq]`, fp32 (fp64 for fp64 inputs).
        query: `[B, Sq, H, D]`.
        means: of all key blocks of the mask.
        mask: over `Sq` query tokens and all keys.
        scale: factor on the scores.

    Returns:
        `[B, Sq, H, D]` in the dtype of `out`, to whose largest finite values it is clamped.

    Raises:
        ValueError: no LSE, without which nothing can be merged.
    """
    if lse is None:
        raise ValueError(
            "the kernel returned no LSE, which the remainder needs; use one that does, or remainder='drop'"
        )
    if out.numel() == 0 or mask.key_length == 0:
        return out
    # One matrix for all blocks: the mean over tokens.
    slope = None if means.slope is None else means.slope * (scale / mask.key_length)
    if triton_runs_on(out.device):
        from sp_sparse.remainder.triton_attend import add_remainder_triton, takes_query

        if takes_query(query, out, mask):
            return add_remainder_triton(out, lse, query, means.tokens, slope, mask, scale)
    with without_autocast(out.device):
        rest, rest_lse = attend_means(query, means.tokens, slope, mask, scale)
        most = torch.finfo(out.dtype).max
        return merge(out, lse, rest, rest_lse)[0].clamp_(-most, most).to(out.dtype)


def attend_means(
    query: Tensor, tokens: Tensor, slope: Tensor | None, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the means of the blocks that the mask leaves out, in plain torch on any device.

    Args:
        query: `[B, Sq, H, D]`.
        tokens: as in `BlockMeans`, of all key blocks.
        slope: `s C` for each head, `[B, H, D, D]`, or None.
        mask, scale: as for `add_remainder`.

    Returns:
        out `[B, Sq, H, D]` and its LSE `[B, H, Sq]`, `-inf` for a row that leaves nothing out; fp32 (fp64 for fp64).
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, length, heads, head_dim = query.shape
    block = mask.block_size[0]
    key_means, value_means = (tokens[:, :, :, side].to(compute) for side in (0, 1))
    log_tokens = torch.full(key_means.shape[2:3], math.log(mask.block_size[1]), dtype=compute, device=query.device)
    log_tokens[-1] = math.log(mask.last_key_tokens)
    out = torch.empty(batch, length, heads, head_dim, dtype=compute, device=query.device)
    lse = torch.empty(batch, heads, length, dtype=compute, device=query.device)
    rows = max(1, _BUDGET // (batch * heads * block * mask.num_key_blocks))
    for first in range(0, mask.num_query_blocks, rows):
        part = mask.query_rows(first, min(first + rows, mask.num_query_blocks))
        tokens_of = slice(first * block, first * block + part.query_length)
        q = query[:, tokens_of].transpose(1, 2).to(compute)
        chosen = part.to_dense().repeat_interleave(block, 2)[:, :, : part.query_length]
        scores = (q @ key_means.transpose(2, 3) * scale + log_tokens).masked_fill_(chosen, float("-inf"))
        total = scores.logsumexp(-1)
        rest = (scores - total.unsqueeze(-1)).exp() @ value_means
        if slope is not None:
            rest = rest + q @ slope
        # A row that leaves nothing out has (-inf) - (-inf) here.
        out[:, tokens_of] = rest.masked_fill((total == float("-inf")).unsqueeze(-1), 0.0).transpose(1, 2)
        lse[:, :, tokens_of] = total
    return out, lse
