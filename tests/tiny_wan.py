"""Wan 2.2 pipelines in miniature, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Grid of tokens 4 x 4 x 4 = 64 for the 16-channel models at 64 x 64 and 13 frames.
SIZE = {"height": 64, "width": 64, "num_frames": 13}


def tiny_transformer(seed: int, heads: int = 4, in_channels: int = 16, out_channels: int = 16) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            # Random weights give near-uniform attention, under which a wrong block hardly shows.
            block.attn1.norm_q.weight.mul_(3.0)
            block.attn1.norm_k.weight.mul_(3.0)
    return model


def _parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(100)
    vae: Any = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(chr(c), -3.0) for c in range(33, 127)]
    encoder = UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    return {
        "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0),
        "text_encoder": UMT5EncoderModel(encoder).eval(),
        "vae": vae.eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def tiny_pipeline(family: str) -> Any:
    """`t2v` and `i2v` have two experts, as the A14B models; `ti2v` has one, with a timestep for every token."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    pipe: Any
    if family == "t2v":
        pipe = WanPipeline(
            transformer=tiny_transformer(1), transformer_2=tiny_transformer(2), boundary_ratio=0.875, **_parts()
        )
    elif family == "i2v":
        experts = [tiny_transformer(seed, in_channels=36) for seed in (1, 2)]
        pipe = WanImageToVideoPipeline(transformer=experts[0], transformer_2=experts[1], boundary_ratio=0.9, **_parts())
    elif family == "ti2v":
        pipe = WanPipeline(transformer=tiny_transformer(1, heads=6), expand_timesteps=True, **_parts())
    else:
        raise ValueError(f"unknown family {family!r}; use t2v, i2v or ti2v")
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    if "ImageToVideo" in type(pipe).__name__:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (arguments["height"], arguments["width"], 3), dtype=np.uint8)
        arguments["image"] = Image.fromarray(pixels)
    latents: Tensor = pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames
    return latents
