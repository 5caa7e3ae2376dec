"""The sizes of the published Wan 2.2 models, part by part, as their configuration files have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}

_TRANSFORMER: dict[str, Any] = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}


@dataclass(frozen=True)
class RealSize:
    """What the parts of a model are configured with.

    Attributes:
        transformer: of each expert, without the number of layers.
        layers: of each expert of the published model.
        experts: 2 where a second transformer takes over at low noise.
        vae: what differs from the defaults of `AutoencoderKLWan`.
        flow_shift: of the scheduler.
        boundary_ratio: share of the noise under which the second expert takes over.
        per_token: whether each token has a timestep of its own (`expand_timesteps`).
        text_encoder: of `UMT5EncoderModel`.
    """

    transformer: dict[str, Any]
    layers: int
    experts: int
    vae: dict[str, Any]
    flow_shift: float
    boundary_ratio: float | None = None
    per_token: bool = False
    text_encoder: dict[str, Any] = field(default_factory=lambda: dict(_UMT5_XXL))


T2V_A14B = RealSize(
    transformer={**_TRANSFORMER, "num_attention_heads": 40, "in_channels": 16, "out_channels": 16, "ffn_dim": 13824},
    layers=40,
    experts=2,
    vae={},
    flow_shift=3.0,
    boundary_ratio=0.875,
)

TI2V_5B = RealSize(
    transformer={**_TRANSFORMER, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336},
    layers=30,
    experts=1,
    vae={
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        # The statistics of the trained VAE would mean nothing to random weights.
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
    flow_shift=5.0,
    per_token=True,
)
