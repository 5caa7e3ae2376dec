"""Where LoRA weights are: a file, a folder or a hub id, and what the file says beside its weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Of several files in a folder, the one that diffusers or peft writes.
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
# owner/name, and after it a file of that repository.
_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(?:/(?P<file>[\w./-]+))?")
# Under this key diffusers keeps the configuration of an adapter, and beside its file peft.
_METADATA, _CONFIG = "lora_adapter_metadata", "adapter_config.json"


@dataclass(frozen=True)
class LoraFile:
    """A file of LoRA weights on this machine.

    Attributes:
        config: r, lora_alpha, alpha_pattern and others of peft; empty where the file tells nothing.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The names of the weights, which are not read.

        Raises:
            ValueError: the file cannot be read.
        """
        if self.path.suffix != ".safetensors":
            return list(self.weights())
        from safetensors import safe_open

        with _readable(), safe_open(self.path, "pt") as file:
            return list(file.keys())

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor, on the CPU.

        Raises:
            ValueError: the file cannot be read.
        """
        from safetensors.torch import load_file

        with _readable():
            if self.path.suffix == ".safetensors":
                return load_file(self.path)
            found: dict[str, Tensor] = torch.load(self.path, map_location="cpu", weights_only=True)
            return found

    def alpha_of(self, layer: str, rank: int) -> float:
        """Alpha of a layer that has none among the weights; the rank, so that nothing is scaled, unless peft tells one."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)),
            self.config.get("lora_alpha", rank),
        )
        return float(alpha) * (math.sqrt(rank) if self.config.get("use_rslora") else 1.0)


def find_lora(source: str) -> LoraFile:
    """The file that a source names, fetched from the hub if it is there.

    Raises:
        ValueError: there is none, or more than one; it cannot be fetched or read; or it holds DoRA weights.
    """
    path = Path(source)
    if source and path.is_dir():
        name = _only_one([file.name for file in path.iterdir()], source)
        path, config = path / name, path / _CONFIG
    elif source and path.is_file():
        config = path.parent / _CONFIG
    else:
        path, config = _fetched(source)
    found = LoraFile(path, _config_of(path, config))
    if found.config.get("use_dora"):
        raise ValueError(
            "has DoRA weights, which are not applied here; merge them into the model by the tool that made them, or give "
            "plain LoRA weights"
        )
    return found


def _fetched(source: str) -> tuple[Path, Path]:
    """Weights of the hub, and where peft's configuration of them would be."""
    hub = _HUB.fullmatch(source)
    if hub is None or (hub["file"] is None and Path(source).suffix in _SUFFIXES):
        raise ValueError(
            "is no file, no folder and no hub id; give a .safetensors file that is there, owner/name, or "
            "owner/name/file.safetensors"
        )
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        names = list_repo_files(hub["repository"]) if hub["file"] is None else [hub["file"]]
    except Exception as error:  # whatever the hub and the network have to say
        raise ValueError(_not_fetched(error)) from error
    name = _only_one(names, hub["repository"])
    try:
        path = Path(hf_hub_download(hub["repository"], name))
        if _CONFIG in names or Path(name).stem == "adapter_model":
            hf_hub_download(hub["repository"], str(Path(name).with_name(_CONFIG)))
    except Exception as error:
        raise ValueError(_not_fetched(error)) from error
    return path, path.parent / _CONFIG


def _not_fetched(error: Exception) -> str:
    return (
        f"is no file here, and cannot be fetched from the hub ({str(error).splitlines()[0]}); give a .safetensors file, or "
        "owner/name/file.safetensors"
    )


def _only_one(names: Sequence[str], where: str) -> str:
    files = sorted(name for name in names if Path(name).suffix in _SUFFIXES)
    if not files:
        raise ValueError("has no weights in it; give a folder with a .safetensors file")
    usual = [name for name in _USUAL if name in files]
    if len(files) > 1 and not usual:
        some = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        raise ValueError(f"has {len(files)} files of weights ({some}); give one of them, such as {where}/{files[0]}")
    return usual[0] if usual else files[0]


def _config_of(path: Path, config: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with _readable():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get(_METADATA)
            if told is not None:
                return {key.removeprefix("transformer."): value for key, value in json.loads(told).items()}
        if path.stem == "adapter_model" and config.is_file():
            found: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
            return found
    return {}


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever safetensors, pickle and the disk have to say
        # torch tells at length how to run a file that is none of weights alone.
        told = "it is no file of weights" if isinstance(error, UnpicklingError) else " ".join(str(error).split())
        raise ValueError(f"cannot be read ({told}); give LoRA weights that were made for this model") from error
