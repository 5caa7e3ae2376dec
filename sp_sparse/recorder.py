"""What really ran: calls, kernels and densities, measured from the masks and not from what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sp_sparse.mask import BlockMask
from sp_sparse.parallel.mesh import SequenceParallelMesh

# expert, layer, step (None where the loop does not tell it)
_Place = tuple[int, int, "int | None"]


@dataclass(eq=False)
class AttentionRecorder:
    """Collects one entry an attention call, without synchronising with the device until `summary` is asked for.

    Attributes:
        keep_masks: keep every block mask, for looking at them; they hold 4 bytes an attended block pair.
        masks: (expert, layer, step, mask) of each sparse call if so, of this rank's heads and query blocks.
    """

    keep_masks: bool = False
    masks: list[tuple[int, int, int | None, BlockMask]] = field(default_factory=list)
    _calls: Counter[str] = field(default_factory=Counter)
    _dense: Counter[_Place] = field(default_factory=Counter)
    _attended: dict[_Place, Tensor] = field(default_factory=dict)
    _possible: Counter[_Place] = field(default_factory=Counter)

    def record(self, expert: int, layer: int, step: int | None, masks: Sequence[BlockMask | None], kernel: str) -> None:
        """Note a call by the masks of its chunks of heads; they are None where it was dense."""
        place = (expert, layer, step)
        sparse = [mask for mask in masks if mask is not None]
        if not sparse:
            self._calls["dense"] += 1
            self._dense[place] += 1
            return
        self._calls[kernel] += 1
        mask = BlockMask.join_heads(sparse)
        if self.keep_masks:
            self.masks.append((expert, layer, step, mask))
        pairs = mask.attended_pairs()
        self._attended[place] = self._attended[place] + pairs if place in self._attended else pairs
        batch, heads, _ = mask.counts.shape
        self._possible[place] += batch * heads * mask.query_length * mask.key_length

    def summary(self, mesh: SequenceParallelMesh) -> dict[str, Any]:
        """Calls by kernel on this rank, and the density of each expert, layer and step over all ranks.

        A collective call on meshes of several ranks; it synchronises with the device.
        """
        places = sorted({*self._attended, *self._dense}, key=lambda p: (p[0], p[1], -1 if p[2] is None else p[2]))
        rows = [
            [
                float(self._attended[p]) if p in self._attended else 0.0,
                float(self._possible[p]),
                float(self._dense[p]),
            ]
            for p in places
        ]
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        for group in mesh.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, (places, table.tolist()), group=group)
            places, table = _sum_by_place(parts)
        densities = [
            {
                "expert": p[0],
                "layer": p[1],
                "step": p[2],
                "dense_calls": int(row[2]),
                "density": row[0] / row[1] if row[1] else 1.0,
            }
            for p, row in zip(places, table.tolist(), strict=True)
        ]
        return {"calls": dict(self._calls), "densities": densities}


def _sum_by_place(parts: list[tuple[list[_Place], list[list[float]]]]) -> tuple[list[_Place], Tensor]:
    sums: dict[_Place, Tensor] = {}
    for places, rows in parts:
        for place, row in zip(places, rows, strict=True):
            sums[place] = sums.get(place, torch.zeros(3, dtype=torch.float64)) + torch.tensor(row, dtype=torch.float64)
    ordered = sorted(sums, key=lambda p: (p[0], p[1], -1 if p[2] is None else p[2]))
    return ordered, torch.stack([sums[p] for p in ordered]) if ordered else torch.zeros(0, 3, dtype=torch.float64)
