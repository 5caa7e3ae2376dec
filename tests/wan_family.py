"""The Wan family beside Wan 2.2 T2V, I2V and TI2V, in miniature with random weights, and short runs of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sp_sparse.generate.random_models import tiny_vace, tiny_wan_2_1, tiny_wan_2_1_image

# 4 x 4 x 4 = 64 tokens.
SIZE = {"height": 64, "width": 64, "num_frames": 13}

# Of 4 steps at strength 0.8, 3 run.
V2V_STEPS = 3

_FACE_SIDE = 16
_SMALL: dict[str, Any] = {
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
    "num_attention_heads": 8,
    "out_channels": 16,
    "cross_attn_norm": True,
}


def family_pipeline(member: str) -> Any:
    """`t2v`, `i2v`, `flf` (first and last frame) and `v2v` of Wan 2.1; `vace` and `animate`."""
    import diffusers

    if member in ("i2v", "flf"):
        pipe = tiny_wan_2_1_image(torch.float32, last_image=member == "flf")
    else:
        pipe = tiny_wan_2_1(torch.float32)
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    if member == "v2v":
        pipe = diffusers.WanVideoToVideoPipeline(**parts)
    elif member == "vace":
        pipe = tiny_vace(torch.float32)
    elif member == "animate":
        images = tiny_wan_2_1_image(torch.float32).components
        images = {name: images[name] for name in ("image_encoder", "image_processor")}
        pipe = diffusers.WanAnimatePipeline(**{**parts, **images, "transformer": animate_transformer()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate_transformer() -> Any:
    """Two layers, with a face adapter after each."""
    from diffusers import WanAnimateTransformer3DModel

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model: Any = WanAnimateTransformer3DModel(
            in_channels=36,
            image_dim=32,
            added_kv_proj_dim=128,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=_FACE_SIDE,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
            **_SMALL,
        )
        model.eval()
        # Random weights give near-uniform attention, under which a wrong block hardly shows.
        for block, adapter in zip(model.blocks, model.face_adapter, strict=True):
            block.attn1.norm_q.weight.mul_(2.0)
            block.attn1.norm_k.weight.mul_(2.0)
            adapter.to_out.weight.mul_(4.0)
    return model


def pictures(count: int, seed: int, side: int = 64) -> list[Image.Image]:
    """Squares of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def run(pipe: Any, **overrides: Any) -> Tensor:
    """The final latents of a short run with guidance, from a fixed seed."""
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        **SIZE,
    }
    kind = type(pipe).__name__
    if kind == "WanImageToVideoPipeline":
        arguments["image"], last = pictures(2, 0)
        if pipe.transformer.config.pos_embed_seq_len is not None:
            arguments["last_image"] = last
    elif kind == "WanVideoToVideoPipeline":
        frames = arguments.pop("num_frames")
        arguments |= {"video": pictures(frames, 1), "num_inference_steps": 4, "strength": 0.8}
    elif kind == "WanVACEPipeline":
        mask = [Image.fromarray(np.asarray(frame) // 128 * 255) for frame in pictures(SIZE["num_frames"], 3)]
        arguments |= {"video": pictures(SIZE["num_frames"], 2), "mask": mask, "reference_images": pictures(1, 4)}
        arguments["conditioning_scale"] = [1.0, 0.5]
    elif kind == "WanAnimatePipeline":
        arguments["segment_frame_length"] = arguments.pop("num_frames")
        # 25 frames are two segments of 13 that share one.
        arguments |= {"image": pictures(1, 5)[0], "pose_video": pictures(25, 6)}
        arguments["face_video"] = pictures(25, 7, _FACE_SIDE)
    latents: Tensor = pipe(**{**arguments, **overrides}, generator=torch.Generator().manual_seed(0)).frames
    return latents
