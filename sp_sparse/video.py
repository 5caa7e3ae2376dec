"""The video grid and the orders in which its tokens can stand in the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

TOKEN_ORDERS = ("raster", "tile", "hilbert")

# 4 x 4 x 8 = 128 tokens: one block of the default size.
TILE = (4, 4, 8)


@dataclass(frozen=True)
class VideoGrid:
    """Tokens of a video along time, height and width (after patching).

    Raises:
        ValueError: a side below 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"grid {self.shape} has an empty side; every side must be at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@lru_cache(maxsize=8)
def token_order(grid: VideoGrid, order: str) -> NDArray[np.int64]:
    """The raster number `(t * height + h) * width + w` of each token of the sequence, `[S]`, read-only.

    `raster` is the model's own order. `tile` walks boxes of 4 x 4 x 8 tokens (clipped at the grid's ends) in raster
    order, raster within each. `hilbert` follows a Hilbert curve through the smallest enclosing power-of-two cube
    (J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 2004) and skips what lies outside the grid.
    Attention does not depend on the order; which tokens share a block does.

    Raises:
        ValueError: an unknown order.
    """
    t, h, w = np.unravel_index(np.arange(grid.num_tokens), grid.shape)
    if order == "raster":
        permutation = np.arange(grid.num_tokens)
    elif order == "tile":
        permutation = np.lexsort((w, h, t, w // TILE[2], h // TILE[1], t // TILE[0]))
    elif order == "hilbert":
        bits = max(max(grid.shape) - 1, 1).bit_length()
        permutation = np.argsort(_hilbert_number(np.stack([t, h, w]), bits), kind="stable")
    else:
        raise ValueError(f"unknown token order {order!r}; use one of {', '.join(TOKEN_ORDERS)}")
    permutation = permutation.astype(np.int64)
    permutation.flags.writeable = False
    return permutation


def inverse_order(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place in the sequence of each raster token."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(permutation.size)
    return inverse


def _hilbert_number(position: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Distance along the Hilbert curve of points `[3, n]` with coordinates below `2^bits`."""
    x = position.copy()
    axes = len(x)
    level = 1 << (bits - 1)
    while level > 1:
        low = level - 1
        for axis in range(axes):
            flip = (x[axis] & level) != 0
            exchange = np.where(flip, 0, (x[0] ^ x[axis]) & low)
            x[0] = np.where(flip, x[0] ^ low, x[0] ^ exchange)
            x[axis] ^= exchange
        level >>= 1
    for axis in range(1, axes):  # Gray code
        x[axis] ^= x[axis - 1]
    parity = np.zeros_like(x[0])
    level = 1 << (bits - 1)
    while level > 1:
        parity ^= np.where(x[axes - 1] & level, level - 1, 0)
        level >>= 1
    x ^= parity
    number = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in range(axes):
            number = (number << 1) | ((x[axis] >> bit) & 1)
    return number
