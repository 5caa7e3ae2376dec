"""Block masks of a video as they were chosen, for `launch/benchmark.py simulate`: recording, writing and reading them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.generate.files import whole_file
from sp_sparse.mask import BlockMask
from sp_sparse.recorder import AttentionRecorder

# expert, layer, step
Place = tuple[int, int, int]

# Evenly spread over those of the model and the loop: at 720p a layer's mask of 40 heads takes 1.8 MB.
_MOST_LAYERS = 6
_MOST_STEPS = 8

_REMEDY = (
    "give --sparse-attn-schedule constant with a --sparse-attn-topk below 1 and without dense steps and layers, or more "
    "--num-inference-steps; or leave --output-masks out"
)


@dataclass(eq=False)
class MaskSampler(AttentionRecorder):
    """Records as its base does, and keeps the masks of up to six layers of each expert at up to eight steps, bit by bit.

    Of two guided calls the first is kept: the caption's. Keeping one waits for the device, so that steps are slower.

    Attributes:
        layers, steps: how many the model and the loop have.
        kept: `[H_rank, Nq_rank, ceil(Nk / 8)]` uint8 a place, this rank's heads and query blocks.
        shape: block size of the masks, and tokens of the sequence; None before the first.
    """

    layers: int = 1
    steps: int = 1
    kept: dict[Place, NDArray[np.uint8]] = field(default_factory=dict)
    shape: tuple[tuple[int, int], int] | None = None

    def __post_init__(self) -> None:
        self._places = _spread(self.layers, _MOST_LAYERS), _spread(self.steps, _MOST_STEPS)

    def record(self, expert: int, layer: int, step: int | None, masks: Sequence[BlockMask | None], kernel: str) -> None:
        super().record(expert, layer, step, masks, kernel)
        sparse = [mask for mask in masks if mask is not None]
        layers, steps = self._places
        if not sparse or step is None or layer not in layers or step not in steps or (expert, layer, step) in self.kept:
            return
        shape = sparse[0].block_size, sparse[0].key_length
        if self.shape not in (None, shape):
            return  # another video of the job, of another size
        self.shape = shape
        dense = BlockMask.join_heads(sparse).to_dense()[0]
        self.kept[expert, layer, step] = np.packbits(dense.cpu().numpy(), axis=-1)


def check_records(config: SparseAttentionConfig, experts: int, layers: int, steps: int) -> None:
    """Refuse settings under which `MaskSampler` would find every call dense.

    Raises:
        ValueError: with the remedy.
    """
    schedules = [config.schedule_for(expert) for expert in range(experts)]
    places = [(layer, step) for layer in _spread(layers, _MOST_LAYERS) for step in _spread(steps, _MOST_STEPS)]
    if all(schedule.density(*place, steps) >= 1.0 for schedule in schedules for place in places):
        raise ValueError(
            f"--output-masks has no masks to record: topk {config.topk:g} with schedule {config.schedule!r}, "
            f"dense_steps={config.dense_steps} and dense_layers={config.dense_layers} leaves all that it looks at, of "
            f"{layers} layers and {steps} steps, dense; {_REMEDY}"
        )


def _spread(count: int, most: int) -> frozenset[int]:
    """At most so many of `range(count)`, its ends among them, evenly spread."""
    return frozenset(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist())


@dataclass(frozen=True, eq=False)
class RecordedMasks:
    """Masks of some layers and steps of one video, whole.

    Attributes:
        places: (expert, layer, step) of each.
        bits: uint8 `[places, H, Nq, ceil(Nk / 8)]`, as `numpy.packbits` packs the last axis of a bool mask over blocks.
        block_size: tokens of a (query block, key block).
        tokens: of the sequence.
        about: what they were recorded with, for tables.
    """

    places: tuple[Place, ...]
    bits: NDArray[np.uint8]
    block_size: tuple[int, int]
    tokens: int
    about: dict[str, Any]

    @classmethod
    def assemble(
        cls, parts: Sequence[tuple[Mapping[Place, NDArray[np.uint8]], tuple[tuple[int, int], int] | None]],
        ulysses_degree: int,
        about: dict[str, Any],
    ) -> RecordedMasks:  # fmt: skip
        """From `kept` and `shape` of the ranks that share a sequence, in the order of the mesh.

        Raises:
            ValueError: no sparse call was at a place that is kept.
        """
        shape = parts[0][1]
        places = tuple(sorted(parts[0][0]))
        if shape is None or not places:
            raise ValueError(f"no masks to record: every step and layer that is looked at was dense; {_REMEDY}")
        groups = [parts[first : first + ulysses_degree] for first in range(0, len(parts), ulysses_degree)]
        whole = [
            np.concatenate([np.concatenate([kept[place] for kept, _ in group]) for group in groups], axis=1)
            for place in places
        ]
        return cls(places, np.stack(whole), *shape, about)

    @property
    def heads(self) -> int:
        return self.bits.shape[1]

    @property
    def key_blocks(self) -> int:
        return -(-self.tokens // self.block_size[1])

    def dense(self, number: int) -> NDArray[np.bool_]:
        """The mask of a place, by its number, `[H, Nq, Nk]`."""
        return np.unpackbits(self.bits[number], axis=-1, count=self.key_blocks).astype(np.bool_)

    def save(self, path: Path) -> None:
        about = json.dumps({"block_size": self.block_size, "tokens": self.tokens, **self.about})
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, places=np.array(self.places), bits=self.bits, about=np.array(about))

    @classmethod
    def load(cls, path: Path) -> RecordedMasks:
        """What `save` wrote.

        Raises:
            ValueError: anything else.
            OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                block_size, tokens = tuple(about.pop("block_size")), about.pop("tokens")
                places = tuple(tuple(place) for place in arrays["places"].tolist())
                found = cls(places, arrays["bits"], block_size, tokens, about)
                fits = found.bits.shape[::3] == (len(places), -(-found.key_blocks // 8))
        except (ValueError, KeyError, TypeError, AttributeError, BadZipFile, EOFError) as error:
            raise ValueError(
                f"{path} holds no recorded masks ({error}); give a file that `generate --output-masks` wrote"
            ) from error
        if not fits:
            raise ValueError(
                f"{path} has masks of shape {found.bits.shape} for {len(places)} places and {found.key_blocks} key blocks; "
                "record them again with `generate --output-masks`"
            )
        return found
