"""What all layers of the package ask about devices: where its Triton code runs, and how autocast is kept away."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch


def triton_runs_on(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 8.0 or later and triton is installed."""
    return device.type == "cuda" and _installed() and torch.cuda.get_device_capability(device) >= (8, 0)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it torch computes on `device` in the precision of its inputs, whatever the caller's autocast says."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
