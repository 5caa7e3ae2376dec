"""Where this package's Triton code beside the attention kernel runs: selection, mask tables, merge."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def triton_runs_on(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 8.0 or later and triton is installed."""
    return device.type == "cuda" and _installed() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
