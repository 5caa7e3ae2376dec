"""Wan with random weights: whole pipelines in miniature, and stand-ins as wide as the published models."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from sp_sparse.generate.placement import Placement
from sp_sparse.generate.real_sizes import T2V_A14B, RealSize

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

# Of a VAE in miniature.
_SHALLOW: dict[str, Any] = {
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}

_TINY_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
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


def tiny_wan_2_1(dtype: torch.dtype, from_video: bool = False) -> Any:
    """One expert of 8 heads and a VAE of 16 channels, in the topology of Wan 2.1 T2V."""
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    pipeline = WanVideoToVideoPipeline if from_video else WanPipeline
    expert = _transformer(1, dtype, num_attention_heads=8, in_channels=16, out_channels=16, **_TINY)
    return pipeline(**_parts(), transformer=expert, vae=_vae_16())


def tiny_wan_2_1_image(dtype: torch.dtype, last_image: bool = False) -> Any:
    """As `tiny_wan_2_1`, with the first frame in 20 more input channels and in cross-attention: Wan 2.1 I2V, or with
    `last_image` FLF2V, which has the last frame there, too."""
    from diffusers import WanImageToVideoPipeline

    encoder, processor = _image_encoder()
    size = encoder.config
    places = (size.image_size // size.patch_size) ** 2 + 1
    expert = _transformer(
        1,
        dtype,
        num_attention_heads=8,
        in_channels=36,
        out_channels=16,
        image_dim=size.hidden_size,
        added_kv_proj_dim=8 * _TINY["attention_head_dim"],
        pos_embed_seq_len=2 * places if last_image else None,
        **_TINY,
    )
    images = {"image_encoder": encoder, "image_processor": processor}
    return WanImageToVideoPipeline(**_parts(), **images, transformer=expert, vae=_vae_16())


def tiny_vace(dtype: torch.dtype) -> Any:
    """VACE: `tiny_wan_2_1` of three layers, with a control path whose two blocks give hints to the first and the last."""
    from diffusers import WanVACEPipeline

    config = {**_TINY, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    expert = _transformer(
        1, dtype, "WanVACETransformer3DModel", num_attention_heads=8, in_channels=16, out_channels=16, **config
    )
    return WanVACEPipeline(**_parts(), transformer=expert, vae=_vae_16())


def random_stand_in(
    size: RealSize,
    layers: int,
    full: bool,
    from_image: bool,
    drawn_on: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
) -> Any:
    """A model as wide as the published one, so that a job needs the memory and the time of a real one.

    The text encoder, then each block of the transformers is drawn alone, brought to its place by `placement` if given,
    and moved to `device`. So weights are the same wherever they end, and what draws them never holds a whole expert besides.

    Args:
        layers: of each expert.
        full: with text encoder and VAE of real size; else with a VAE in miniature and no text encoder, to measure
            transformers alone.
        from_image: a pipeline whose video starts from an image; of TI2V.
        drawn_on: where numbers are drawn: a GPU is many times as fast as a CPU, and draws others.
        device: where the pipeline is to be.
        dtype: of the experts and the text encoder; the VAE is in float32, as the authors run it.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline

    parts: dict[str, Any] = {"scheduler": _scheduler(size.flow_shift), "tokenizer": None, "text_encoder": None}
    if full:
        with torch.device(drawn_on):
            parts |= {"tokenizer": _tokenizer(), "text_encoder": _text_encoder(dtype, size.text_encoder)}
            parts["vae"] = _vae(**size.vae).to(device)
        # First of all: nothing else is there yet while it is whole.
        if placement is not None and device == placement.device:
            placement.place_text_encoder(parts["text_encoder"])
        else:
            parts["text_encoder"].to(device)
    else:
        parts["vae"] = _vae_48() if size.per_token else _vae_16()
    for seed, name in enumerate(("transformer", "transformer_2")[: size.experts], start=1):
        parts[name] = _by_blocks(layers, seed, drawn_on, device, dtype, placement, size.transformer)
    pipeline = WanImageToVideoPipeline if from_image else WanPipeline
    return pipeline(**parts, boundary_ratio=size.boundary_ratio, expand_timesteps=size.per_token)


def random_a14b(
    layers: int, device: torch.device, dtype: torch.dtype, placement: Placement | None = None, **changed: Any
) -> Any:
    """Both A14B experts in full width but for what is `changed`, made on `device`, with a tiny VAE and no text encoder: for
    measuring."""
    size = replace(T2V_A14B, transformer={**T2V_A14B.transformer, **changed})
    return random_stand_in(size, layers, False, False, device, device, dtype, placement)


def random_a14b_transformer(layers: int, device: torch.device, dtype: torch.dtype, **changed: Any) -> Any:
    """One A14B expert in full width but for what is `changed` of its configuration, made on `device`: for measuring."""
    with torch.device(device):
        return _transformer(1, dtype, num_layers=layers, **{**T2V_A14B.transformer, **changed})


def _by_blocks(
    layers: int,
    seed: int,
    drawn_on: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None,
    config: dict[str, Any],
) -> Any:
    with torch.device(drawn_on):
        model = _transformer(seed, dtype, num_layers=0, **config).to(device)
    for layer in range(layers):
        with torch.device(drawn_on):
            block = _transformer(1000 * seed + layer, dtype, num_layers=1, **config).blocks[0]
        if placement is not None:
            placement.place_block(block, model)
        if device != drawn_on:
            block.to(device)
        model.blocks.append(block)
    model.register_to_config(num_layers=layers)
    return model


def _experts(dtype: torch.dtype, **config: Any) -> dict[str, Any]:
    return {"transformer": _transformer(1, dtype, **config), "transformer_2": _transformer(2, dtype, **config)}


def _transformer(seed: int, dtype: torch.dtype, kind: str = "WanTransformer3DModel", **config: Any) -> Any:
    import diffusers

    with _seeded(seed), _default_dtype(dtype), torch.no_grad():
        model: Any = getattr(diffusers, kind)(patch_size=(1, 2, 2), cross_attn_norm=True, **config)
        model.eval()
        for block in (*model.blocks, *getattr(model, "vace_blocks", ())):
            block.attn1.norm_q.weight.mul_(_NORM_SCALE)
            block.attn1.norm_k.weight.mul_(_NORM_SCALE)
    for name, parameter in model.named_parameters():
        # As from_pretrained does: these stay in float32 whatever the dtype.
        if any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


def _parts() -> dict[str, Any]:
    """Tokenizer, text encoder and scheduler, none of which needs a file."""
    return {
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(torch.float32, _TINY_TEXT_ENCODER),
        "scheduler": _scheduler(3.0),
    }


def _image_encoder() -> tuple[Any, Any]:
    """CLIP's, of 32-pixel images in 4 patches, and what prepares images for it."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    side = 32
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=side // 2,
    )
    with _seeded(5):
        encoder = CLIPVisionModel(config).eval()
    size = {"height": side, "width": side}
    return encoder, CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)


def _tokenizer() -> Any:
    """Of letters and signs: 128 tokens at most."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)


def _scheduler(flow_shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def _text_encoder(dtype: torch.dtype, config: dict[str, Any]) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    with _seeded(3), _default_dtype(dtype):
        return UMT5EncoderModel(UMT5Config(**config)).eval()


def _vae_16() -> Any:
    return _vae(**_SHALLOW, base_dim=3, z_dim=16)


def _vae_48() -> Any:
    return _vae(
        **_SHALLOW,
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

    with _seeded(4), _default_dtype(torch.float32):
        vae: Any = AutoencoderKLWan(**config)
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
