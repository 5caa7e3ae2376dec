"""On what, with what and when something was measured."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("triton", "diffusers", "flash-attn-4", "flashinfer-python", "vllm-omni", "vllm", "fa3-fwd", "sp-sparse")


def environment(device: torch.device) -> dict[str, Any]:
    """The keys `hardware`, `versions` and `date` of a result."""
    cuda = device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "versions": _versions(cuda),
        "date": date.today().isoformat(),
    }


def _versions(cuda: bool) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if cuda:
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
