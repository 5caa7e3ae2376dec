"""How the Triton kernel is launched: a table, so that nothing is tuned or timed while a model runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """How one program attends one query block.

    Attributes:
        tile: keys attended at a time; divides the key block.
        warps: warps of a program.
        stages: depth of the software pipeline.
        registers: the most registers a thread may take, or None. With 128, two programs of 8 warps share a
            multiprocessor, so that the softmax of one runs beside the products of the other.
    """

    tile: int
    warps: int
    stages: int
    registers: int | None = None


# By (query block, key block, head dimension): the fastest of those tried on an H200 in bf16.
_HOPPER_TMA = {
    (128, 128, 128): LaunchConfig(64, 8, 2, 128),
    (128, 64, 128): LaunchConfig(64, 8, 2, 128),
    (64, 64, 128): LaunchConfig(64, 4, 3),
    (64, 128, 128): LaunchConfig(64, 4, 3),
    (128, 128, 64): LaunchConfig(128, 8, 2, 128),
    (128, 64, 64): LaunchConfig(64, 8, 3),
    (64, 64, 64): LaunchConfig(64, 4, 2),
    (64, 128, 64): LaunchConfig(128, 4, 2),
}
_HOPPER_POINTERS = {
    (128, 128, 128): LaunchConfig(128, 8, 2),
    (128, 64, 128): LaunchConfig(64, 8, 3),
    (64, 64, 128): LaunchConfig(64, 4, 3),
    (64, 128, 128): LaunchConfig(64, 4, 3),
    (128, 128, 64): LaunchConfig(128, 8, 2, 128),
    (128, 64, 64): LaunchConfig(64, 8, 3),
    (64, 64, 64): LaunchConfig(64, 4, 3),
    (64, 128, 64): LaunchConfig(64, 4, 3),
}


def launch_config(block_size: tuple[int, int], head_dim: int, tma: bool, capability: tuple[int, int]) -> LaunchConfig:
    """The configuration for (query block, key block) in tokens on a device of this compute capability."""
    if capability[0] == 9:
        table = _HOPPER_TMA if tma else _HOPPER_POINTERS
        return table[block_size[0], block_size[1], head_dim]
    # Not timed: within the 99 KB of shared memory that the smallest of the other devices have.
    return LaunchConfig(tile=64, warps=block_size[0] // 16, stages=2)
