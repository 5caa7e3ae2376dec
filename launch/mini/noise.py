"""How much noise the clips of a training step get."""

from __future__ import annotations

import torch
from torch import Tensor

from launch.mini.parts import FLOW_SHIFT


def noise_levels(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Levels [count] between `low` and `high` of 0 to 1, as dense as the scheduler's steps lie: uniform, then shifted.

    One level in each of `count` equal parts of the range, so that the losses of steps are alike.
    """
    device = generator.device
    first, last = _unshifted(low), _unshifted(high)
    parts = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    plain = first + (last - first) * parts / count
    return FLOW_SHIFT * plain / (1 + (FLOW_SHIFT - 1) * plain)


def _unshifted(level: float) -> float:
    return level / (FLOW_SHIFT - (FLOW_SHIFT - 1) * level)
