"""Wan 2.2 with random weights: whole pipelines in miniature, and the A14B transformers in full width."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sp_sparse.generate.placement import Placement

# Random weights give near-uniform attention, under which a wrong block hardly shows.
_NORM_SCALE = 2.0

# Places for patches along each side, and for latent frames.
TINY_POSITIONS = 128

_TINY: dict[str, Any] = {
    "attention_head_dim": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": TINY_POSITIONS,
}

# The published T2V-A14B transformers, but for the number of layers.
_A14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
}


def tiny_text_to_video(dtype: torch.dtype) -> Any:
    """Two experts of 8 heads and a VAE of 16 channels, in the topology of T2V-A14B."""
    from diffusers import WanPipeline

    experts = _experts(dtype, num_attention_heads=8, in_channels=16, out_channels=16, **_TINY)
    return WanPipeline(**_parts(), **experts, vae=_vae_16(), boundary_ratio=0.875)


def tiny_image_to_video(dtype: torch.dtype) -> Any:
    """As `tiny_text_to_video`, with the first frame in 20 more input channels: I2V-A14B."""
    from diffusers import WanImageToVideoPipeline

    experts = _experts(dtype, num_attention_heads=8, in_channels=36, out_channels=16, **_TINY)
    return WanImageToVideoPipeline(**_parts(), **experts, vae=_vae_16(), boundary_ratio=0.9)


def tiny_text_image_to_video(dtype: torch.dtype, from_image: bool) -> Any:
    """One expert of 6 heads, a timestep for every token and a VAE of 48 channels: TI2V-5B."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    pipeline = WanImageToVideoPipeline if from_image else WanPipeline
    expert = _transformer(1, dtype, num_attention_heads=6, in_channels=48, out_channels=48, **_TINY)
    return pipeline(**_parts(), transformer=expert, vae=_vae_48(), expand_timesteps=True)


def random_a14b(
    layers: int, device: torch.device, dtype: torch.dtype, placement: Placement | None = None, **changed: Any
) -> Any:
    """Both A14B experts in full width but for what is `changed`, made on `device`, with a tiny VAE and no text encoder: for
    measuring. Each block is drawn alone, and brought to its place by `placement` if one is given."""
    from diffusers import WanPipeline

    config = {**_A14B, **changed}
    names = ("transformer", "transformer_2")
    experts = {name: _by_blocks(layers, seed + 1, device, dtype, placement, config) for seed, name in enumerate(names)}
    parts = {**_parts(), "tokenizer": None, "text_encoder": None}
    return WanPipeline(**parts, **experts, vae=_vae_16(), boundary_ratio=0.875)


def random_a14b_transformer(layers: int, device: torch.device, dtype: torch.dtype, **changed: Any) -> Any:
    """One A14B expert in full width but for what is `changed` of its configuration, made on `device`: for measuring."""
    with torch.device(device):
        return _transformer(1, dtype, num_layers=layers, **{**_A14B, **changed})


def _by_blocks(
    layers: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None,
    config: dict[str, Any],
) -> Any:
    with torch.device(device):
        model = _transformer(seed, dtype, num_layers=0, **config)
    for layer in range(layers):
        with torch.device(device):
            block = _transformer(1000 * seed + layer, dtype, num_layers=1, **config).blocks[0]
        if placement is not None:
            placement.place_block(block, model)
        model.blocks.append(block)
    model.register_to_config(num_layers=layers)
    return model


def _experts(dtype: torch.dtype, **config: Any) -> dict[str, Any]:
    return {"transformer": _transformer(1, dtype, **config), "transformer_2": _transformer(2, dtype, **config)}


def _transformer(seed: int, dtype: torch.dtype, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    with _seeded(seed), _default_dtype(dtype), torch.no_grad():
        model: Any = WanTransformer3DModel(patch_size=(1, 2, 2), cross_attn_norm=True, **config)
        model.eval()
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(_NORM_SCALE)
            block.attn1.norm_k.weight.mul_(_NORM_SCALE)
    for name, parameter in model.named_parameters():
        # As from_pretrained does: these stay in float32 whatever the dtype.
        if any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


def _parts() -> dict[str, Any]:
    """Tokenizer, text encoder and scheduler, none of which needs a file."""
    from diffusers import UniPCMultistepScheduler
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    config = UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    with _seeded(3):
        encoder = UMT5EncoderModel(config).eval()
    return {
        "tokenizer": T5Tokenizer(vocab=special + letters, extra_ids=0),
        "text_encoder": encoder,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _vae_16() -> Any:
    return _vae(base_dim=3, z_dim=16)


def _vae_48() -> Any:
    return _vae(
        base_dim=4,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )


def _vae(**config: Any) -> Any:
    from diffusers import AutoencoderKLWan

    with _seeded(4):
        vae: Any = AutoencoderKLWan(
            dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], **config
        )
    return vae.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same numbers on every rank, and the caller's random state as it was."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
