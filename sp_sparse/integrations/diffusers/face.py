"""Animate's face adapter on tokens that are ordered and cut: each token attends to the face at its own frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sp_sparse.integrations.diffusers.call import WanCall


class FrameAlignedProcessor:
    """Cross-attention of a face adapter over this rank's tokens.

    The model's own takes the sequence for frames of equally many tokens, one after another. Which frame a token belongs to
    is known here, so it attends to all frames' faces under a mask that leaves its own.
    """

    def __init__(self, call: WanCall, adapter: Any) -> None:
        self._call, self._adapter, self._own = call, adapter, adapter.processor

    def place(self) -> FrameAlignedProcessor:
        """Become the processor of the adapter, until `remove`."""
        self._adapter.set_processor(self)
        return self

    def remove(self) -> None:
        """Give the adapter its own processor back; one that was set since stays."""
        if self._adapter.processor is self:
            self._adapter.set_processor(self._own)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`hidden_states` `[B, S_rank, C]` and faces `[B, T, N, C]`, N tokens a frame -> `[B, S_rank, C]`."""
        if attention_mask is not None:
            raise ValueError("the face adapter takes no attention_mask on tokens that are cut; leave it out")
        frames, tokens = encoder_hidden_states.shape[1:3]
        grid = self._call.plan.grid
        if frames != grid.frames:
            raise ValueError(
                f"the face video gives {frames} latent frames and the video has {grid.frames}; give one face frame for "
                "each frame of the video"
            )
        faces = attn.pre_norm_kv(encoder_hidden_states).flatten(1, 2)
        query = attn.to_q(attn.pre_norm_q(hidden_states))
        if attn.fused_projections:
            key, value = attn.to_kv(faces).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(faces), attn.to_v(faces)
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        own_frame = self._call.plan.local // (grid.height * grid.width)
        of_frame = torch.arange(frames, device=own_frame.device).repeat_interleave(tokens)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=own_frame[:, None] == of_frame
        )
        return attn.to_out(out.transpose(1, 2).flatten(2, 3).type_as(query))
