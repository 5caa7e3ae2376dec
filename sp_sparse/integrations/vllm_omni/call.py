"""What vllm-omni tells of one attention call: the video's grid, from the model; the denoising step, from the pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from sp_sparse.video import VideoGrid

_REMEDY = "choose another attention backend for this model"


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        grid: tokens of the whole video.
        step, num_steps: the denoising step and their number; None where the pipeline does not tell it.
    """

    grid: VideoGrid
    step: int | None
    num_steps: int | None

    @classmethod
    def now(cls, frames: int, height: int, width: int) -> Call:
        """On a video of so many tokens, at the step that vllm-omni's forward context holds."""
        grid = VideoGrid(frames, height, width)
        if not is_forward_context_available():
            return cls(grid, None, None)
        context = get_forward_context()
        return cls(grid, context.denoise_step_idx, context.total_denoise_steps)

    def metadata(self) -> AttentionMetadata:
        """What the model told, for vllm-omni's own attention."""
        layout = VideoTokenLayout(prefix_len=0, latent_grid=self.grid.shape, used_len=self.grid.num_tokens)
        return AttentionMetadata(video_layout=layout)


def video_grid(metadata: AttentionMetadata | None) -> tuple[int, int, int]:
    """Tokens of the video along time, height and width.

    Raises:
        ValueError: the sequence is not one video, or is attended under a mask.
    """
    layout = None if metadata is None else metadata.video_layout
    if metadata is None or layout is None or layout.latent_grid is None:
        raise ValueError(
            f"the model does not tell the grid of its video (video_layout), which SP_SPARSE needs; {_REMEDY}"
        )
    grid = layout.latent_grid
    if layout.prefix_len or layout.video_spans or layout.used_len not in (None, math.prod(grid)):
        raise ValueError(
            f"the sequence holds more than one video of {grid}: {layout}; SP_SPARSE takes video tokens alone, {_REMEDY}"
        )
    for name in ("attn_mask", "full_attn_spans", "joint_query"):
        if getattr(metadata, name) is not None:
            raise ValueError(f"this call has {name}, which SP_SPARSE does not take; {_REMEDY}")
    return grid
