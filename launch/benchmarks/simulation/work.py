"""What a layer has to do: its size, and how many tiles of its mask each rank attends of each shard of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp_sparse.mask import num_blocks
from sp_sparse.parallel.shards import SequenceShards

Tiles = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSize:
    """Of one call of a layer; 2 bytes an element."""

    tokens: int
    heads: int
    head_dim: int = 128
    block: int = 128

    @property
    def blocks(self) -> int:
        return num_blocks(self.tokens, self.block)

    def token_bytes(self, tokens: float, heads: float) -> float:
        """Of one of query, key, value and output."""
        return tokens * heads * self.head_dim * 2


class TileMap:
    """Tiles of one mask for every cut of its sequence.

    A recording may be of another size than the layer: it is stretched over the layer's sequence, and its heads are repeated
    until there are as many as the layer has. A shard edge within a recorded block takes its share of it.
    """

    def __init__(self, mask: NDArray[np.bool_], size: LayerSize) -> None:
        """`mask`: `[H, Nq, Nk]`, over blocks."""
        heads, rows, columns = mask.shape
        self._size = size
        sums = np.zeros((heads, rows + 1, columns + 1))
        sums[:, 1:, 1:] = mask.cumsum(1, dtype=np.float64).cumsum(2)
        self._mask = mask
        self._sums = sums * (size.blocks / rows * size.blocks / columns)
        self._head = np.arange(size.heads) % heads

    def tiles(self, edges: tuple[int, ...]) -> Tiles:
        """`[H, R, R]`: of each head, query shard and key shard; `edges` are the first tokens of the shards, then the end."""
        places = np.array(edges) / edges[-1]
        found = _at(_at(self._sums, places, 1), places, 2)
        return np.diff(np.diff(found, axis=1), axis=2)[self._head]

    def needed(self, edges: tuple[int, ...]) -> Tiles:
        """`[H, R, R]`: of each head, query shard and key shard, the share of the key blocks that any query block attends."""
        rows, columns = (np.array(edges) / edges[-1] * side for side in self._mask.shape[1:])
        shards = list(zip(rows[:-1], rows[1:], strict=True))
        attended = np.stack([self._mask[:, int(a) : math.ceil(b)].any(1) for a, b in shards], axis=1)
        sums = np.zeros((*attended.shape[:2], self._mask.shape[2] + 1))
        sums[:, :, 1:] = attended.cumsum(2, dtype=np.float64)
        found: Tiles = np.diff(_at(sums, columns / self._mask.shape[2], 2), axis=2) / np.diff(columns)
        return found[self._head]


def _at(sums: Tiles, places: NDArray[np.float64], axis: int) -> Tiles:
    """Running sums between blocks, at fractions of the sequence."""
    at = places * (sums.shape[axis] - 1)
    below = np.minimum(at.astype(int), sums.shape[axis] - 2)
    shape = [1, 1, 1]
    shape[axis] = len(places)
    above = (at - below).reshape(shape)
    found: Tiles = sums.take(below, axis) * (1 - above) + sums.take(below + 1, axis) * above
    return found


def ring_edges(size: LayerSize, ring_degree: int) -> tuple[int, ...]:
    """Where ring shards begin, as the layer cuts them."""
    return SequenceShards.aligned(size.tokens, size.block, 1, ring_degree).edges
