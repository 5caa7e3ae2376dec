"""What the names of LoRA weights mean, whichever library wrote them: the layer that they change, and how.

A name is `[prefix]<layer><suffix>`. Layers are named as diffusers has them, or as Wan's own code and the libraries around it
do (`blocks.0.self_attn.q`); kohya's and musubi's names have `_` in place of every dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

# How a weight changes its layer.
DOWN, UP, ALPHA, WEIGHT, BIAS, UP_BIAS, MODULATION = "down", "up", "alpha", "weight", "bias", "up_bias", "modulation"

_SUFFIXES = {
    # Two factors, and the number by which their product is scaled: alpha / rank.
    ".lora_A.weight": DOWN,
    ".lora_down.weight": DOWN,
    ".lora.down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_up.weight": UP,
    ".lora.up.weight": UP,
    ".lora_B.bias": UP_BIAS,
    ".alpha": ALPHA,
    # Differences that are added as they are; of norms by other names.
    ".diff": WEIGHT,
    ".w_norm": WEIGHT,
    ".diff_b": BIAS,
    ".b_norm": BIAS,
    ".diff_m": MODULATION,
}

# peft puts the adapter's name amid its own.
_ADAPTER = re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$")

_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon's Tucker factors",
}

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
)
_OWN_PREFIX = "transformer."

# diffusers' names, from the first part that fits, and Wan's.
_WAN_NAMES = (
    (r"\battn1\b", "self_attn"),
    (r"\battn2\b", "cross_attn"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "o"),
    (r"\badd_([kv])_proj\b", r"\1_img"),
    (r"\bnorm_added_k\b", "norm_k_img"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(blocks\.\d+)\.norm2\b", r"\1.norm3"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"(blocks\.\d+)\.proj_in\b", r"\1.before_proj"),
    (r"(blocks\.\d+)\.proj_out\b", r"\1.after_proj"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out\b", "head.head"),
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
)


@dataclass(frozen=True)
class LoraKey:
    """A name, taken apart: `layer` is as the file has it, without a prefix."""

    name: str
    layer: str
    how: str
    by_diffusers: bool


def read_key(name: str) -> LoraKey | None:
    """The name taken apart; None for one that says nothing about a layer.

    Raises:
        ValueError: a kind of weights that would not be applied as it was meant.
    """
    for part, kind in _REFUSED.items():
        if part in name:
            raise ValueError(
                f"has {kind} weights ({name}), which are not applied here; merge them into the model by the tool that made "
                "them, or give plain LoRA weights"
            )
    plain = _ADAPTER.sub(r".\1.\2", name)
    suffix = next((suffix for suffix in _SUFFIXES if plain.endswith(suffix)), None)
    if suffix is None:
        return None
    layer, by_diffusers = plain.removesuffix(suffix), False
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    if layer.startswith(_OWN_PREFIX):
        layer, by_diffusers = layer.removeprefix(_OWN_PREFIX), True
    return LoraKey(name, layer, _SUFFIXES[suffix], by_diffusers)


@dataclass(frozen=True)
class LayerNames:
    """What the layers and lone parameters of a transformer are called, in diffusers' and in Wan's words."""

    own: dict[str, str] = field(default_factory=dict)
    wan: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, transformer: nn.Module) -> LayerNames:
        """The names of `transformer`, whose layers peft may have wrapped."""
        # Of two layers that swap their names in Wan's code, the one without weights is none.
        names = [name for name, layer in transformer.named_modules() if name and any(True for _ in layer.parameters())]
        names += [name for name, _ in transformer.named_parameters() if not name.endswith((".weight", ".bias"))]
        return cls({_flat(name): name for name in names}, {_flat(wan_name(name)): name for name in names})

    def find(self, key: LoraKey) -> str | None:
        """diffusers' name of the layer, or of the parameter, that a weight changes; None if there is none."""
        layer = f"{key.layer}.modulation" if key.how == MODULATION else key.layer
        # norm2 is a layer in both, and not the same one.
        first, second = (self.own, self.wan) if key.by_diffusers else (self.wan, self.own)
        return first.get(_flat(layer), second.get(_flat(layer)))


def wan_name(name: str) -> str:
    """What Wan's own code calls a layer of diffusers' transformer."""
    for ours, theirs in _WAN_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def has_differences(names: Iterable[str]) -> bool:
    """Whether some of the weights are added to the model's own, and not put beside them.

    Raises:
        ValueError: a kind of weights that would not be applied as it was meant.
    """
    keys = [read_key(name) for name in names]
    return any(key is not None and key.how in (WEIGHT, BIAS, UP_BIAS, MODULATION) for key in keys)


def _flat(name: str) -> str:
    return name.replace(".", "_")
