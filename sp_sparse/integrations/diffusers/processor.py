"""The attention processor that replaces a Wan block's self-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from sp_sparse.attention import SparseAttention
from sp_sparse.integrations.diffusers.call import WanCall
from sp_sparse.integrations.opaque import OpaqueCall


class SparseWanProcessor:
    """Self-attention of one Wan block over this rank's tokens, through `SparseAttention`.

    It has no `_attention_backend`, so that `model.set_attention_backend` goes on choosing for cross-attention alone.
    """

    def __init__(self, attention: SparseAttention, call: WanCall, own: Callable[..., Any]) -> None:
        """`own` is the processor that it replaces."""
        self._attend = OpaqueCall(partial(call.attend, attention))
        self._own, self._removed = own, False

    def remove_from(self, attn: Any) -> None:
        """Give the layer its own processor back. One that was set since stays, and is passed on to it if it calls this."""
        self._removed = True
        if attn.processor is self:
            attn.set_processor(self._own)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`hidden_states` `[B, S_rank, C]` and `rotary_emb` (cos, sin) `[1, S_rank, 1, D]` -> `[B, S_rank, C]`."""
        if self._removed:
            return cast(Tensor, self._own(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb))
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "sparse self-attention takes neither encoder_hidden_states nor attention_mask; use it for attn1 only"
            )
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(query), attn.norm_k(key), value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        out = self._attend(query, key, value).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of neighbouring pairs; the tables repeat each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
