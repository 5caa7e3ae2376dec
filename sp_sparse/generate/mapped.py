"""A pipeline whose transformers stay in their files, mapped into memory and in the dtype that they have there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def mapped_pipeline(kind: Any, model: str, dtypes: dict[str, torch.dtype], device: torch.device) -> Any:
    """The pipeline of class `kind` in a folder or hub repository: all but its transformers on `device`, in `dtypes`."""
    import diffusers

    folder = Path(model) if Path(model).is_dir() else Path(diffusers.DiffusionPipeline.download(model))
    index: dict[str, Any] = kind.load_config(folder)
    parts = [name for name in ("transformer", "transformer_2") if (index.get(name) or [None])[0] is not None]
    pipe = kind.from_pretrained(folder, dtype=dtypes, device_map=device.type, **dict.fromkeys(parts))
    for name in parts:
        dtype = _stored_dtype(folder / name) or dtypes["default"]
        transformer = getattr(diffusers, index[name][1])
        pipe.register_modules(**{name: transformer.from_pretrained(folder, subfolder=name, dtype=dtype)})
    return pipe


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Of the largest weight in the first safetensors file; None without one, or for a dtype to cast from while loading."""
    from safetensors import safe_open

    file = min(folder.glob("*.safetensors"), default=None)
    if file is None:
        return None
    with safe_open(file, "pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118  it is no mapping
        largest = max(slices, key=lambda part: torch.Size(part.get_shape()).numel())
        return _DTYPES.get(largest.get_dtype())
