"""What really ran: calls, kernels, exchanges and densities, measured from the masks and not from what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.mask import BlockMask

# expert, layer, step (None where the loop does not tell it)
_Place = tuple[int, int, "int | None"]

# attended pairs, all pairs of the sparse calls, dense calls
_Totals = tuple[float, int, int]


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
    _exchanges: Counter[tuple[str, str]] = field(default_factory=Counter)
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
        if self.keep_masks:
            self.masks.append((expert, layer, step, BlockMask.join_heads(sparse)))
        for mask in sparse:
            pairs = mask.attended_pairs()
            self._attended[place] = self._attended[place] + pairs if place in self._attended else pairs
            batch, heads, _ = mask.counts.shape
            self._possible[place] += batch * heads * mask.query_length * mask.key_length

    def record_exchange(self, kv_exchange: tuple[str, str]) -> None:
        """Note how a call's keys and values went over a ring, and why so."""
        self._exchanges[kv_exchange] += 1

    def clear(self) -> None:
        """Forget everything, as for another video."""
        for collected in (self.masks, self._calls, self._exchanges, self._dense, self._attended, self._possible):
            collected.clear()

    def summary(self, groups: Sequence[ProcessGroup] = ()) -> dict[str, Any]:
        """Calls by kernel and by key/value exchange on this rank, and the density of each expert, layer and step over all
        ranks of `mesh.groups`.

        A collective call where there are groups; it synchronises with the device.
        """
        totals = {
            place: (float(self._attended.get(place, 0.0)), self._possible[place], self._dense[place])
            for place in {*self._attended, *self._dense}
        }
        for group in groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, totals, group=group)
            totals = _sum_by_place(parts)
        densities = [
            {
                "expert": place[0],
                "layer": place[1],
                "step": place[2],
                "dense_calls": dense,
                "density": attended / possible if possible else 1.0,
            }
            for place, (attended, possible, dense) in sorted(totals.items(), key=_in_order)
        ]
        exchanges = [
            {"name": name, "reason": reason, "calls": calls} for (name, reason), calls in self._exchanges.items()
        ]
        return {"calls": dict(self._calls), "kv_exchange": exchanges, "densities": densities}


def _sum_by_place(parts: Sequence[dict[_Place, _Totals]]) -> dict[_Place, _Totals]:
    sums: dict[_Place, _Totals] = {}
    for part in parts:
        for place, (attended, possible, dense) in part.items():
            before = sums.get(place, (0.0, 0, 0))
            sums[place] = before[0] + attended, before[1] + possible, before[2] + dense
    return sums


def _in_order(item: tuple[_Place, _Totals]) -> tuple[int, int, int]:
    expert, layer, step = item[0]
    return expert, layer, -1 if step is None else step
