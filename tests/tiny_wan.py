"""Wan 2.2 pipelines in miniature, with random weights, and short runs of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sp_sparse.generate.random_models import tiny_image_to_video, tiny_text_image_to_video, tiny_text_to_video

# 4 x 4 x 4 = 64 tokens; the VAE of TI2V shrinks twice as much.
SIZE = {"height": 64, "width": 64, "num_frames": 13}


def tiny_pipeline(family: str) -> Any:
    """`t2v` and `i2v` have two experts, as the A14B models; `ti2v` has one, with a timestep for every token."""
    build = {
        "t2v": tiny_text_to_video,
        "i2v": tiny_image_to_video,
        "ti2v": lambda dtype: tiny_text_image_to_video(dtype, from_image=False),
        "ti2v-image": lambda dtype: tiny_text_image_to_video(dtype, from_image=True),
    }
    pipe = build[family](torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_transformer() -> Any:
    return tiny_pipeline("t2v").transformer


def run(pipe: Any, **overrides: Any) -> Tensor:
    """The final latents of a four-step run with guidance, from a fixed seed."""
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "latent",
        **SIZE,
        **overrides,
    }
    if pipe.vae.config.scale_factor_spatial == 16:
        arguments["height"], arguments["width"] = 2 * arguments["height"], 2 * arguments["width"]
    if "ImageToVideo" in type(pipe).__name__:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (arguments["height"], arguments["width"], 3), dtype=np.uint8)
        arguments["image"] = Image.fromarray(pixels)
    latents: Tensor = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    return latents


def inputs(model: Any, frames: int = 4, side: int = 8) -> dict[str, Any]:
    """Of a forward of `model`, from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, side, side, generator=generator),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "return_dict": False,
    }
