"""LoRA weights: each source an adapter of its own, at its own weight; one that would change nothing is refused."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import GenerateArguments

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# The two factors of a layer's weights, by the names of the libraries that write them.
_FACTORS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))


def check_lora(arguments: GenerateArguments) -> None:
    """Refuse sources that cannot be there, before weights are read.

    Raises:
        ValueError: neither a file, nor a folder with weights, nor like a hub id.
    """
    for name in ("lora", "lora_2"):
        for source in getattr(arguments, name):
            path = Path(source)
            if source and path.is_dir() and not any(file.suffix in _SUFFIXES for file in path.iterdir()):
                raise ValueError(
                    f"{flag_of(name)} {source} has no weights in it; give a folder with a .safetensors file"
                )
            is_hub_id = _HUB_ID.fullmatch(source) is not None and path.suffix not in _SUFFIXES
            if not source or not (path.exists() or is_hub_id):
                raise ValueError(
                    f"{flag_of(name)} {source!r} is no file, no folder and no hub id; give a .safetensors file that is "
                    "there, or owner/name"
                )


def load_lora(pipe: Any, arguments: GenerateArguments) -> None:
    """Load every source into its expert.

    Raises:
        ValueError: a source that cannot be read, or of which a weight does not fit the expert.
    """
    for name, scale_name, part in (
        ("lora", "lora_scale", "transformer"),
        ("lora_2", "lora_scale_2", "transformer_2"),
    ):
        adapters = []
        for number, source in enumerate(getattr(arguments, name)):
            adapter, transformer = f"{name}_{number}", getattr(pipe, part)
            try:
                keys = pipe.lora_state_dict(source)  # by diffusers' names, whoever wrote the file
                pipe.load_lora_weights(source, adapter_name=adapter, load_into_transformer_2=part == "transformer_2")
            except Exception as error:  # whatever diffusers, peft and the hub have to say
                raise ValueError(
                    f"{flag_of(name)} {source} cannot be loaded into {arguments.model} ({error}); give LoRA weights that "
                    "were made for this model"
                ) from error
            misfits = _misfits(keys, transformer, adapter)
            if misfits or not keys:
                told = (
                    f"has {len(keys)} weights, of which {len(keys) - len(misfits)} fit the {part} of {arguments.model}"
                )
                some = ", ".join(misfits[:3]) + (", …" if len(misfits) > 3 else "")
                raise ValueError(
                    f"{flag_of(name)} {source} {told}{', and not ' * bool(some)}{some}; give LoRA weights that were made "
                    "for this model"
                )
            adapters.append(adapter)
        if adapters:
            # Loading leaves the last one active alone.
            scales = getattr(arguments, scale_name) or (1.0,)
            getattr(pipe, part).set_adapters(adapters, list(scales * len(adapters))[: len(adapters)])


def _misfits(keys: Collection[str], transformer: Any, adapter: str) -> list[str]:
    """The weights that no layer has taken, or whose other factor is missing; diffusers only warns of them."""
    layers = dict(transformer.named_modules())

    def taken(key: str) -> bool:
        name = re.split(r"[._](?:lora|lokr)[._]", key.removeprefix("transformer."))[0]
        parts = getattr(layers.get(name), "adapter_layer_names", ())  # peft's, of a layer that it has wrapped
        return key.startswith("transformer.") and any(adapter in getattr(layers[name], part) for part in parts)

    def whole(key: str) -> bool:
        pairs = ((mine, other) for pair in _FACTORS for mine, other in (pair, pair[::-1]))
        others = [key.replace(mine, other) for mine, other in pairs if f"{mine}.weight" in key]
        return all(other in keys for other in others)

    return [key for key in keys if not (taken(key) and whole(key))]
