"""What was seen of masks, for tables and the page: heat maps, and the share of attention that they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sp_sparse.fidelity.pictures import mask_uri
from sp_sparse.fidelity.store import ResultStore
from sp_sparse.fidelity.summary import Summary
from sp_sparse.fidelity.tables import Table


@dataclass(frozen=True)
class MaskCell:
    """One layer at one step.

    Attributes:
        expert, layer, step: which.
        picture: the masks of some heads side by side, a data URI.
        covered: share of the attention that the masks cover, the mean over all heads.
        least: that of the head of which it covers least.
    """

    expert: int
    layer: int
    step: int
    picture: str
    covered: float
    least: float


@dataclass(frozen=True)
class MaskSection:
    """The masks of one setting.

    Attributes:
        label: of the setting.
        density: as measured in its videos.
        heads: numbers of those in the pictures.
        cells: by expert, layer and step.
        head_spread: 5th percentile over heads, layers and steps of the share that is covered.
    """

    label: str
    density: float
    heads: tuple[int, ...]
    cells: tuple[MaskCell, ...]
    head_spread: float

    @property
    def covered(self) -> float:
        return float(np.mean([cell.covered for cell in self.cells]))


def mask_sections(store: ResultStore, summary: Summary, prompt: str) -> list[MaskSection]:
    """Of every setting whose masks were looked at for this prompt."""
    found = []
    for row in summary.settings:
        arrays = None if row.setting is None else store.masks(row.setting, prompt)
        if arrays is None or not len(arrays["places"]):
            continue
        cells = tuple(
            MaskCell(
                int(place[0]),
                int(place[1]),
                int(place[2]),
                mask_uri(masks),
                float(covered.mean()),
                float(covered.min()),
            )
            for place, masks, covered in zip(arrays["places"], arrays["masks"], arrays["covered"], strict=True)
        )
        heads = tuple(int(head) for head in arrays["heads"])
        spread = float(np.quantile(arrays["covered"], 0.05))
        found.append(MaskSection(row.label, row.density, heads, cells, spread))
    return found


def mask_table(sections: Sequence[MaskSection], prompt: str) -> Table:
    """The share of attention that masks cover."""
    rows = tuple(
        (section.label, f"{section.density:.3f}", f"{section.covered:.3f}", f"{section.head_spread:.3f}")
        for section in sections
    )
    note = (
        f"Softmax mass of the kept blocks, for the prompt {prompt!r} at seed 0: the mean over up to four layers and steps "
        "and all heads, and the 5th percentile over them. Each setting is looked at along its own video."
    )
    return Table("Attention mass covered", note, ("setting", "density", "mean", "5th percentile"), rows)
