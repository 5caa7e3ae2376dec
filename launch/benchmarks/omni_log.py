"""What the log of a `vllm serve --omni` tells of SP_SPARSE: which layers of which ranks ran, how, and how dense."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# As `SparseSelfAttention` tells it, once a layer, size of video, kind and density; layers but the first at DEBUG.
_TOLD = re.compile(
    r"SP_SPARSE rank (?P<rank>\d+) layer (?P<layer>\d+), video \((?P<video>\d+, \d+, \d+)\) under (?P<mesh>.+?): "
    r"(?:sparse by kernel (?P<kernel>\S+), density (?P<density>\d[\d.]*)|dense by (?P<dense>.+))"
)


@dataclass(frozen=True)
class Told:
    """One line.

    Attributes:
        rank: of the worker, among all of the server.
        layer: number of the layer; both experts of Wan 2.2 number theirs from 0.
        video: its tokens along time, height and width.
        mesh: degrees of vllm-omni's sequence parallelism.
        how: the kernel, or what dense attention it was.
        density: share of key blocks asked for, 1.0 where it was dense.
    """

    rank: int
    layer: int
    video: tuple[int, ...]
    mesh: str
    how: str
    density: float


def read_log(text: str) -> list[Told]:
    """The lines of SP_SPARSE in a log; what other processes wrote may stand before one, on the same line."""
    found = []
    for line in text.splitlines():
        told = _TOLD.search(line)
        if told is None:
            continue
        found.append(
            Told(
                rank=int(told["rank"]),
                layer=int(told["layer"]),
                video=tuple(int(side) for side in told["video"].split(",")),
                mesh=told["mesh"],
                how=told["kernel"] or told["dense"],
                density=float(told["density"] or 1.0),
            )
        )
    return found


def expert_layers(model: Path) -> tuple[int, ...]:
    """Layers of each transformer of a diffusers pipeline, from the files of its folder.

    Raises:
        ValueError: no such pipeline.
    """
    index = model / "model_index.json"
    if not index.is_file():
        raise ValueError(f"there is no {index}; give the folder of a diffusers pipeline of Wan")
    parts = json.loads(index.read_text(encoding="utf-8"))
    names = [name for name in ("transformer", "transformer_2") if (parts.get(name) or [None])[0] is not None]
    configs = [json.loads((model / name / "config.json").read_text(encoding="utf-8")) for name in names]
    return tuple(int(config["num_layers"]) for config in configs)


def check_every_layer(told: Sequence[Told], layers: Sequence[int], ranks: int) -> None:
    """Refuse lines of one video that do not tell of every layer of every expert on every rank, all sparse.

    Args:
        told: what was told since the request of a video whose size is new to the server, at one density.
        layers: of each expert.
        ranks: workers that share a video.

    Raises:
        ValueError: with what was told and what was expected.
    """
    dense = [line for line in told if line.density >= 1.0]
    if dense:
        raise ValueError(
            f"{len(dense)} of {len(told)} lines tell of dense attention, the first of layer {dense[0].layer} by "
            f"{dense[0].how}; leave out settings that make layers or steps dense"
        )
    found = {line.rank for line in told}
    if found != set(range(ranks)):
        raise ValueError(
            f"{len(found)} ranks told of SP_SPARSE, expected {ranks}; see that the log is at level DEBUG, that the "
            "configuration names SP_SPARSE for role self, and that no video of this size was made before"
        )
    counts = Counter((line.rank, line.layer) for line in told)
    for rank in range(ranks):
        for layer in range(max(*layers, *(line.layer + 1 for line in told))):
            expected = sum(layer < depth for depth in layers)
            if counts[rank, layer] != expected:
                raise ValueError(
                    f"rank {rank} told {counts[rank, layer]} times of layer {layer}, expected {expected}, once an "
                    "expert; ask for enough steps that every expert has some, and for one density at all of them"
                )
