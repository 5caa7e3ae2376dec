"""How dense each layer is at each denoising step: decided on the host, from numbers the pipeline's loop knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "conservative", "aggressive", "table")


@dataclass(frozen=True)
class Schedule:
    """(layer, step, number of steps) -> density, the share of key blocks kept; 1.0 is dense attention.

    * `constant`: `topk` always.
    * `conservative`: the first quarter of the steps (rounded up) and layer 0 are dense; else `topk`.
    * `aggressive`: falls linearly from `topk` at the first step to `topk / 2` at the last.
    * `table`: `table[layer]` (the last row for layers beyond it), stretched over the steps.

    Attributes:
        topk: share of key blocks that each query block keeps, in (0, 1].
        kind: one of the above.
        table: rows of densities for `table`, one row a layer; a single row holds for every layer.
        dense_steps: first steps that are dense whatever the kind says.
        dense_layers: first layers likewise.

    Raises:
        ValueError: a share outside (0, 1], an unknown kind, a table missing or given to another kind.
    """

    topk: float
    kind: str = "conservative"
    table: tuple[tuple[float, ...], ...] = ()
    dense_steps: int = 0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; use one of {', '.join(SCHEDULES)}")
        for share in (self.topk, *(entry for row in self.table for entry in row)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"topk {share} is outside (0, 1]; it is the share of key blocks kept, 1.0 being dense")
        if (self.kind == "table") != bool(self.table) or not all(self.table):
            raise ValueError(
                f"schedule {self.kind!r} with a table of {len(self.table)} rows; "
                "give non-empty rows to 'table' and only to it"
            )
        if min(self.dense_steps, self.dense_layers) < 0:
            raise ValueError(f"dense_steps={self.dense_steps}, dense_layers={self.dense_layers}; use 0 or more")

    @property
    def needs_step(self) -> bool:
        """Whether the density depends on the step."""
        return (
            self.dense_steps > 0 or self.kind in ("conservative", "aggressive") or any(len(r) > 1 for r in self.table)
        )

    def density(self, layer: int, step: int | None, num_steps: int | None) -> float:
        """The share of key blocks to keep, in (0, 1].

        Raises:
            ValueError: the density depends on a step that is not known, or a step outside [0, num_steps).
        """
        if layer < self.dense_layers or (self.kind == "conservative" and layer == 0):
            return 1.0
        if not self.needs_step:
            return self.table[min(layer, len(self.table) - 1)][0] if self.table else self.topk
        if step is None or num_steps is None:
            raise ValueError(
                f"schedule {self.kind!r} with dense_steps={self.dense_steps} needs the denoising step, which this call "
                "does not know; pass step and num_steps, use a pipeline that sets cache_context, or schedule='constant'"
            )
        if not 0 <= step < num_steps:
            raise ValueError(f"step {step} is outside [0, {num_steps})")
        if step < self.dense_steps or (self.kind == "conservative" and step < math.ceil(num_steps / 4)):
            return 1.0
        if self.kind == "aggressive":
            return self.topk * (1.0 - 0.5 * step / max(num_steps - 1, 1))
        if self.kind == "table":
            row = self.table[min(layer, len(self.table) - 1)]
            return row[step * len(row) // num_steps]
        return self.topk
