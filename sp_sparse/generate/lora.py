"""LoRA weights: each source an adapter of its own, all of them at weight 1; one that would change nothing is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import GenerateArguments

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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
        ValueError: a source that cannot be read, or of which no weight fits the expert.
    """
    for name, part in (("lora", "transformer"), ("lora_2", "transformer_2")):
        adapters = []
        for number, source in enumerate(getattr(arguments, name)):
            adapter, transformer = f"{name}_{number}", getattr(pipe, part)
            try:
                pipe.load_lora_weights(source, adapter_name=adapter, load_into_transformer_2=part == "transformer_2")
            except Exception as error:  # whatever diffusers, peft and the hub have to say
                raise ValueError(
                    f"{flag_of(name)} {source} cannot be loaded into {arguments.model} ({error}); give LoRA weights that "
                    "were made for this model"
                ) from error
            if adapter not in getattr(transformer, "peft_config", {}):
                raise ValueError(
                    f"{flag_of(name)} {source} has no weight that fits the {part} of {arguments.model}; give LoRA weights "
                    "that were made for this model"
                )
            adapters.append(adapter)
        if adapters:
            # Loading leaves the last one active alone.
            getattr(pipe, part).set_adapters(adapters, [1.0] * len(adapters))
