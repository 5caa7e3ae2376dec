"""What vllm-omni tells.

Of one attention call: the video's grid, from the model; the denoising step, from the pipeline. Of its sequence parallelism,
as ours: which of its ranks share a layer's queries, and who holds which tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from sp_sparse.parallel.agreement import check_call
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.video import VideoGrid

# Who holds which tokens when a layer's implementation is called: every token, a ring shard, or own queries and all keys.
Place = Literal["local", "ring", "allgather"]

_MESH = "_sp_sparse_mesh"
_REMEDY = "choose another attention backend for this model"
_ENGINE_REMEDY = "the engine's workers have lost step; see which of them failed first, and start the server anew"


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


@dataclass(frozen=True)
class OmniMesh:
    """The degrees of vllm-omni's sequence parallelism. Its ranks are numbered as ours, Ulysses fastest."""

    ulysses_degree: int = 1
    ring_degree: int = 1
    allgather_degree: int = 1

    @classmethod
    def of(cls, parallel_config: Any) -> OmniMesh:
        """From a `DiffusionParallelConfig`; None is one rank."""
        if parallel_config is None:
            return cls()
        return cls(parallel_config.ulysses_degree, parallel_config.ring_degree, parallel_config.allgather_degree)

    def __str__(self) -> str:
        names = {"ulysses": self.ulysses_degree, "ring": self.ring_degree, "all-gather-KV": self.allgather_degree}
        return " x ".join(f"{name} {degree}" for name, degree in names.items() if degree > 1) or "one rank"

    @property
    def place(self) -> Place:
        """How tokens are held in a sharded call."""
        if self.ring_degree > 1:
            return "ring"
        return "allgather" if self.allgather_degree > 1 else "local"

    @property
    def ranks(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree * self.allgather_degree

    def heads(self, num_heads: int) -> int:
        """Heads of a rank; vllm-omni pads those that do not divide (`ulysses_mode` advanced_uaa) or refuses them."""
        return math.ceil(num_heads / self.ulysses_degree)

    def padded(self, tokens: int) -> int:
        """Length of a sequence of `tokens` after vllm-omni has padded its end."""
        return math.ceil(tokens / self.ranks) * self.ranks

    def expected(self, tokens: int) -> str:
        """What an attention call on a video of `tokens` brings on this mesh, and what may be amiss if it does not."""
        padded = self.padded(tokens)
        if self.place == "ring":
            return (
                "the ring's own method is called: the hook on it was passed over, or the model attends other tokens too"
            )
        if self.place == "allgather":
            return (
                f"it expects {padded // self.allgather_degree} queries and {padded} gathered keys: the model shards them "
                "otherwise, or attends other tokens too"
            )
        return f"it expects {padded} of each: the model shards them otherwise, or attends other tokens too"

    def groups(self, place: Place) -> SequenceParallelMesh:
        """The ranks that share the queries of a call, the same object for every layer. vllm-omni has built its groups."""
        if place == "local":
            return SequenceParallelMesh()
        built: Any = get_sp_group()
        # Kept with vllm-omni's groups, whose lifetime it shares: layers of one mesh share its stream.
        if getattr(built, _MESH, None) is None:
            group = built.ring_group if place == "ring" else built.allgather_group
            setattr(built, _MESH, SequenceParallelMesh(ring_degree=dist.get_world_size(group), ring_group=group))
        mesh: SequenceParallelMesh = getattr(built, _MESH)
        return mesh

    def check_call(self, call: Call, query: Tensor) -> None:
        """Fail on every rank if the ranks that share the sequence make different calls; all of them make this one.

        Over vllm-omni's group of the hosts, so nothing waits for the device.

        Raises:
            RefusedError: with what differs, and each rank's value of it.
        """
        if self.ranks > 1:
            told = {"step": call.step, "number of steps": call.num_steps, "grid": call.grid.shape}
            check_call(
                {**told, "batch": query.shape[0], "dtype": query.dtype},
                (get_sp_group().cpu_group,),
                torch.device("cpu"),
                _ENGINE_REMEDY,
            )

    def shards(self, place: Place, tokens: int) -> SequenceShards:
        """The cut of `tokens` over those ranks: vllm-omni's, equal shares with padding at the end."""
        if place == "local":
            return SequenceShards((tokens,))
        # Ulysses has put its ranks' shares together, under a ring as under all-gather-KV.
        return SequenceShards.equal(tokens, self.ranks).grouped(self.ulysses_degree)
