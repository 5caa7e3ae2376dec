"""Token orders other than raster, where a rank holds every token: queries, keys and values are put in order on each call.

Rotary embedding has been applied by then, so only which tokens share a block depends on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sp_sparse.video import VideoGrid, inverse_order, token_order


class TokenOrder:
    """Puts tokens in an order and back; the indices stay on the device."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._indices: dict[tuple[VideoGrid, torch.device], tuple[Tensor, Tensor]] = {}

    def enter(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """`[B, S, H, D]` from raster order."""
        return x if self._name == "raster" else x.index_select(1, self._of(grid, x.device)[0])

    def leave(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """`[B, S, H, D]` back to raster order."""
        return x if self._name == "raster" else x.index_select(1, self._of(grid, x.device)[1])

    def _of(self, grid: VideoGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        if (grid, device) not in self._indices:
            permutation = token_order(grid, self._name)
            there, back = (torch.from_numpy(x.copy()).to(device) for x in (permutation, inverse_order(permutation)))
            self._indices[grid, device] = there, back
        return self._indices[grid, device]
