"""The parts of a Wan 2.2 pipeline, untrained, and captions as the pipeline encodes them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.mini.captions import vocabulary
from launch.mini.sizes import CAPTION_TOKENS, TEXT_TOKENS, Sizes

BOUNDARY = 0.875  # noise at which the second expert takes over, as in T2V-A14B
FLOW_SHIFT = 3.0

_BRANCH = 0.1
_LOG_VARIANCE = -6.0  # of latents at first: little noise, so that the decoder sees them


def make_vae(sizes: Sizes) -> Any:
    """Shrinks sides by 4 and frames by 4, with the statistics of latents still to be filled in."""
    from diffusers import AutoencoderKLWan

    channels = sizes.latent_channels
    vae = AutoencoderKLWan(
        base_dim=sizes.encoder_width,
        decoder_base_dim=sizes.decoder_width,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        is_residual=True,  # as in TI2V-5B: averages go past the convolutions, so that it learns faster
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        scale_factor_temporal=4,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    _prepare(vae)
    return vae


@torch.no_grad()
def _prepare(vae: Any) -> None:
    """First weights that let a picture through, nearly linearly: from torch's own the VAE takes long to learn anything."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            # Some biases must be there, or norms would drop how bright a pixel is.
            if module.bias is not None and not name.endswith("conv_in"):
                nn.init.zeros_(module.bias)
        if name.endswith((".conv2", ".proj")):  # the last of a residual branch
            module.weight.mul_(_BRANCH)
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:].mul_(_BRANCH)
    vae.quant_conv.bias[channels:].fill_(_LOG_VARIANCE)


def make_transformer(sizes: Sizes) -> Any:
    """One expert."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        text_dim=sizes.text_width,
        freq_dim=256,
        ffn_dim=sizes.feed_forward,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        rope_max_seq_len=128,
    )


def make_text_encoder(sizes: Sizes) -> Any:
    """UMT5 without dropout."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=-(-len(make_tokenizer()) // 64) * 64,
        d_model=sizes.text_width,
        d_kv=32,
        d_ff=2 * sizes.text_width,
        num_layers=sizes.text_layers,
        num_heads=4,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def make_tokenizer() -> Any:
    """One token for every word of the grammar; other words are spelled, letter by letter."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = [(f"▁{word}", -2.0) for word in vocabulary()]
    letters = [(letter, -8.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0)


def make_scheduler() -> Any:
    """As Wan 2.2 is published."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and what of them is caption, both int64 [B, CAPTION_TOKENS].

    Raises:
        ValueError: a caption that is longer.
    """
    found = tokenizer(list(captions), padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    if found.input_ids.shape[1] > CAPTION_TOKENS:
        raise ValueError(
            f"a caption has {found.input_ids.shape[1]} tokens, and training encodes {CAPTION_TOKENS}; raise CAPTION_TOKENS"
        )
    return found.input_ids, found.attention_mask


def embed(text_encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Captions [B, TEXT_TOKENS, width] as `WanPipeline.encode_prompt` gives them: zeros after each caption's end."""
    states = text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)
    return F.pad(states, (0, 0, 0, TEXT_TOKENS - ids.shape[1]))


def normalize(vae: Any, latents: Tensor) -> Tensor:
    """Latents of the VAE as the transformer sees them: what the pipeline undoes before it decodes."""
    return (latents - _statistic(vae.config.latents_mean, latents)) / _statistic(vae.config.latents_std, latents)


def denormalize(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalize`."""
    return latents * _statistic(vae.config.latents_std, latents) + _statistic(vae.config.latents_mean, latents)


def _statistic(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
