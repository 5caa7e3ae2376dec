"""How the Triton kernel is launched: a table, so that nothing is tuned or timed while a model runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Attributes:
    tile: keys attended at a time; divides the key block.
    warps: warps of a program.
    stages: depth of the software pipeline.
    registers: the most registers a thread may take, or None.
    """

    tile: int
    warps: int
    stages: int
    registers: int | None = None


def launch_config(block_size: tuple[int, int], head_dim: int, tma: bool, capability: tuple[int, int]) -> LaunchConfig:
    """The configuration for (query block, key block) in tokens on a device of this compute capability."""
    warps = block_size[0] // 16
    if tma:
        return LaunchConfig(tile=64, warps=warps, stages=2)
    return LaunchConfig(tile=block_size[1], warps=warps, stages=2)
