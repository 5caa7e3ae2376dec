"""The definition of the remainder, in float64, written without anything from sp_sparse but one block after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracle import expand


def attention_with_remainder(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: tuple[int, int],
    scale: float,
    linear: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention `[B, Sq, H, D]` in `dtype` over the tokens of the chosen blocks and one stand-in for each other block.

    Args:
        query, key, value: `[B, S, H, D]`.
        blocks: the chosen ones, bool `[B, H, Nq, Nk]`.
        linear: add the first-order term to the stand-ins' values.
    """
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    chosen = expand(blocks, block_size, q.shape[2], k.shape[2])
    exact = (q @ k.transpose(2, 3) * scale).masked_fill(~chosen, -math.inf)
    scores, values = [], []
    slope = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=dtype)
    for number, first in enumerate(range(0, k.shape[2], block_size[1])):
        part = slice(first, first + block_size[1])
        mean_key, mean_value = k[:, :, part].mean(2), v[:, :, part].mean(2)
        tokens = k[:, :, part].shape[2]
        slope += (k[:, :, part] - mean_key.unsqueeze(2)).transpose(2, 3) @ v[:, :, part]
        score = (q * mean_key.unsqueeze(2)).sum(-1) * scale + math.log(tokens)
        taken = blocks[..., number].repeat_interleave(block_size[0], 2)[:, :, : q.shape[2]]
        scores.append(score.masked_fill(taken, -math.inf))
        values.append(mean_value)
    stand_ins = torch.stack(scores, -1)
    weights = torch.cat([exact, stand_ins], -1).softmax(-1)
    weights, rest = weights[..., : k.shape[2]], weights[..., k.shape[2] :]
    out = weights @ v + rest @ torch.stack(values, 2)
    if linear:
        out += rest.sum(-1, keepdim=True) * scale * (q @ (slope / k.shape[2]))
    return out.transpose(1, 2)
