"""How the transformers of the Wan family differ: which blocks attend, what enters their forward, where it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sp_sparse.integrations.diffusers.call import WanCall
from sp_sparse.integrations.diffusers.face import FrameAlignedProcessor

WAN, VACE, ANIMATE = "WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"

# Parameters of the forward, in their order. Of these each kind of transformer has its own beside the first four.
_INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
_OWN_INPUTS: dict[str, tuple[str, ...]] = {
    WAN: (),
    VACE: ("control_hidden_states", "control_hidden_states_scale"),
    ANIMATE: ("pose_hidden_states", "face_pixel_values"),
}

Hook = Callable[[], Any]


@dataclass(frozen=True)
class AttendingBlock:
    """A block with self-attention over the video's tokens.

    Attributes:
        block: the module; its self-attention is `attn1`.
        layer: number of the layer by which its density is scheduled.
    """

    block: Any
    layer: int


def kind_of(model: Any) -> str | None:
    """Which transformer of the family `model` is; None for any other."""
    import diffusers

    return next((kind for kind in _OWN_INPUTS if isinstance(model, getattr(diffusers, kind))), None)


def input_names(model: Any) -> tuple[str, ...]:
    """The tensors that a forward of `model` takes, in the order of its parameters."""
    kind = kind_of(model)
    return _INPUTS if kind is None else _INPUTS + _OWN_INPUTS[kind]


def attending_blocks(model: Any) -> list[AttendingBlock]:
    """The blocks with self-attention, in the order in which a forward runs them.

    Those of VACE's control path run first. Each makes the hint that is added after one layer of the main path, and is
    scheduled as that layer.
    """
    control = zip(model.vace_blocks, model.config.vace_layers, strict=True) if kind_of(model) == VACE else ()
    found = [AttendingBlock(block, layer) for block, layer in control]
    return found + [AttendingBlock(block, layer) for layer, block in enumerate(model.blocks)]


def entrances(model: Any, call: WanCall) -> list[Hook]:
    """What places the hooks that cut all that enters the blocks to this rank's tokens; each gives a handle to remove."""
    hooks: list[Hook] = [
        lambda: model.rope.register_forward_hook(lambda m, a, tables: tuple(call.enter(table, 1) for table in tables))
    ]
    kind = kind_of(model)
    if kind == ANIMATE:
        pose = _PoseEntrance(call)
        hooks.append(lambda: model.patch_embedding.register_forward_hook(pose.cut_video))
        hooks.append(lambda: model.pose_patch_embedding.register_forward_hook(pose.cut_pose))
        for adapter in model.face_adapter:
            hooks.append(FrameAlignedProcessor(call, adapter).place)
        return hooks
    # [B, C, T, H, W] -> [B, C, S_rank, 1, 1], which the model flattens to this rank's tokens.
    hooks.append(
        lambda: model.patch_embedding.register_forward_hook(
            lambda m, a, x: call.enter(x.flatten(2), 2)[..., None, None]
        )
    )
    if kind == VACE:
        hooks.append(
            lambda: model.vace_patch_embedding.register_forward_hook(
                lambda m, a, x: call.enter(_padded(x.flatten(2), call.plan.grid.num_tokens), 2)[..., None, None]
            )
        )
    return hooks


def _padded(x: Tensor, tokens: int) -> Tensor:
    """`[B, C, S]` with zeros after it up to `tokens`, which the model would add to a control video that is shorter.

    Raises:
        ValueError: it is longer.
    """
    if x.shape[2] > tokens:
        raise ValueError(
            f"control_hidden_states have {x.shape[2]} tokens and hidden_states {tokens}; give a control video that is no "
            "longer than the video, of the same height and width"
        )
    return nn.functional.pad(x, (0, tokens - x.shape[2]))


class _PoseEntrance:
    """Animate embeds video and pose, then adds the pose to all frames but the first. Here both are cut before that.

    The model adds to all but the first of what it takes for frames, and finds tokens there: the first gets its pose here.
    """

    def __init__(self, call: WanCall) -> None:
        self._call = call
        self._video: Tensor | None = None

    def cut_video(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """Of `[B, C, T, H, W]` this rank's tokens, `[B, C, S_rank, 1, 1]`."""
        self._video = self._call.enter(x.flatten(2), 2)[..., None, None]
        return self._video

    def cut_pose(self, module: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        """Of `[B, C, T - 1, H, W]` those of this rank's tokens but the first, whose pose is added here."""
        video, self._video = self._video, None
        assert video is not None  # the model embeds the video first
        pose = torch.cat([x.new_zeros(*x.shape[:2], 1, *x.shape[3:]), x], dim=2)
        tokens = self._call.enter(pose.flatten(2), 2)[..., None, None]
        video[:, :, :1] += tokens[:, :, :1]
        return tokens[:, :, 1:]
