"""Ulysses (arXiv 2309.14509): all-to-all between sequence shards of all heads and whole sequences of some heads.

Neither the heads nor the tokens have to divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_sequence(x: Tensor, tokens: Sequence[int], heads: Sequence[int], group: ProcessGroup) -> Tensor:
    """`[B, S_rank, H, D]` -> `[B, S_group, H_rank, D]`: give away heads, receive tokens.

    Args:
        x: this rank's tokens, all heads.
        tokens: tokens that each rank of the group holds.
        heads: heads that each rank of the group keeps.
        group: the Ulysses group.
    """
    rank = dist.get_rank(group)
    batch, length, _, head_dim = x.shape
    unit = batch * head_dim
    send = x.new_empty(x.numel())
    # A message is token-major, so that what arrives is already in sequence order.
    sent = [length * count * unit for count in heads]
    for part, selected in zip(send.split(sent), x.split(list(heads), dim=2), strict=True):
        part.view(length, batch, selected.shape[2], head_dim).copy_(selected.transpose(0, 1))
    received = [count * heads[rank] * unit for count in tokens]
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, send, received, sent, group=group)
    return out.view(sum(tokens), batch, heads[rank], head_dim).transpose(0, 1).contiguous()


def scatter_sequence(x: Tensor, tokens: Sequence[int], heads: Sequence[int], group: ProcessGroup) -> Tensor:
    """The reverse: `[B, S_group, H_rank, D]` -> `[B, S_rank, H, D]`."""
    rank = dist.get_rank(group)
    batch, _, _, head_dim = x.shape
    unit = batch * head_dim
    send = x.transpose(0, 1).contiguous().view(-1)
    sent = [count * heads[rank] * unit for count in tokens]
    received = [tokens[rank] * count * unit for count in heads]
    arrived = x.new_empty(sum(received))
    dist.all_to_all_single(arrived, send, received, sent, group=group)
    out = x.new_empty(batch, tokens[rank], sum(heads), head_dim)
    firsts = (0, *accumulate(heads))
    for part, first, count in zip(arrived.split(received), firsts, heads, strict=False):
        out[:, :, first : first + count] = part.view(tokens[rank], batch, count, head_dim).transpose(0, 1)
    return out
