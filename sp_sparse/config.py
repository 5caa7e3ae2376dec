"""The configuration of sparse attention and its command-line flags, from one definition."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from types import MappingProxyType
from typing import Any

from sp_sparse.flags import add_flags, check_numbers, flag_of, option
from sp_sparse.schedule import SCHEDULES, Schedule
from sp_sparse.video import TOKEN_ORDERS

KV_EXCHANGES = ("auto", "ring", "all_gather")
REMAINDERS = ("drop", "mean", "linear")

# Settings by name. Each is as if its values were given; what is given beside it goes before.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "quality": {"backend": "auto", "topk": 0.3, "schedule": "conservative", "remainder": "linear"},
        "balanced": {"backend": "auto", "topk": 0.2, "schedule": "conservative", "remainder": "linear"},
        "fast": {"backend": "auto", "topk": 0.1, "schedule": "conservative", "remainder": "linear"},
    }
)
PRESET_HELP = "settings by name, which the other sparse attention flags override"

# Of the names of the flags: `topk` is `--sparse-attn-topk`.
FLAG_PREFIX = "sparse_attn_"

# The fields that only a second expert reads.
SECOND_EXPERT = ("topk_2", "schedule_2", "schedule_table_2")


def _flag_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _block_size(text: str) -> tuple[int, int]:
    query, _, key = text.partition("x")
    return int(query), int(key or query)


def _table(text: str) -> tuple[tuple[float, ...], ...]:
    rows = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
    return _rows(rows)


def _rows(rows: Any) -> tuple[tuple[float, ...], ...]:
    if rows and not isinstance(rows[0], (list, tuple)):
        rows = [rows]
    return tuple(tuple(map(_density, row)) for row in rows)


def _density(entry: Any) -> float:
    if isinstance(entry, bool):
        raise ValueError(f"{entry} in a schedule table is not a number; give densities in (0, 1]")
    return float(entry)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """What is sparse, and how. Each field is also a flag: `topk` is `--sparse-attn-topk`.

    Raises:
        ValueError: a value outside its range; the text names the value and what is allowed.
    """

    backend: str = option(
        "none", "kernel: none (leave the model as it is), auto, a kernel's name, or package.module:Class"
    )
    topk: float = option(
        0.3,
        "density: share of key blocks that each query block keeps, in (0, 1]; 1.0 is dense",
        float,
        above=0,
        at_most=1,
    )
    topk_2: float | None = option(
        None, "topk of the second (low-noise) expert, if it differs", float, above=0, at_most=1
    )
    schedule: str = option("conservative", "density over layers and steps", choices=SCHEDULES)
    schedule_2: str | None = option(None, "schedule of the second expert, if it differs", choices=SCHEDULES)
    schedule_table: tuple[tuple[float, ...], ...] = option(
        (), "densities over the steps, such as 1,1,0.5,0.3, or a JSON list of one such list a layer", _table
    )
    schedule_table_2: tuple[tuple[float, ...], ...] = option((), "schedule table of the second expert", _table)
    dense_steps: int = option(0, "first denoising steps that stay dense", int, at_least=0)
    dense_layers: int = option(0, "first layers that stay dense", int, at_least=0)
    selector: str = option(
        "topk",
        "topk (highest scores of mean queries and keys), subblock (most attention between quarters of blocks), window "
        "(only the blocks always kept), the name of another package's selector, or package.module:Class",
    )
    remainder: str = option(
        "drop",
        "the blocks that are not kept: drop (left out), mean (as their mean key and value), linear (and how values move "
        "with keys, one matrix a head)",
        choices=REMAINDERS,
    )
    keep_diagonal: bool = option(True, "always keep the key blocks at the query block's own place", _flag_bool)
    keep_first_frame: bool = option(False, "always keep the key blocks that hold tokens of the first frame", _flag_bool)
    window: int = option(0, "key blocks always kept on either side of the diagonal", int, at_least=0)
    block_size: tuple[int, int] = option(
        (128, 128), "tokens of a block, as 128 or as 128x64 (query x key)", _block_size
    )
    token_order: str = option("raster", "order of the tokens, hence which share a block", choices=TOKEN_ORDERS)
    kv_exchange: str = option(
        "auto",
        "how ring ranks come by the others' keys and values: one shard a hop (ring), all at once (all_gather), or as the "
        "ranks, their nodes and the memory have it (auto)",
        choices=KV_EXCHANGES,
    )

    def __post_init__(self) -> None:
        check_numbers(self, str)
        size = self.block_size
        object.__setattr__(self, "block_size", tuple(size) if isinstance(size, (list, tuple)) else (size, size))
        object.__setattr__(self, "schedule_table", _rows(self.schedule_table))
        object.__setattr__(self, "schedule_table_2", _rows(self.schedule_table_2))
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{entry.name}={value!r} is not known; use one of {', '.join(choices)}")
            if entry.metadata["parse"] is _flag_bool and not isinstance(value, bool):
                raise ValueError(f"{entry.name}={value!r} is neither True nor False; give one of them")
        whole = all(isinstance(side, Integral) for side in self.block_size)
        if not whole or len(self.block_size) != 2 or min(self.block_size) < 8 or max(self.block_size) > 256:
            raise ValueError(f"block_size {self.block_size}: each of (query, key) must be in [8, 256]; use (128, 128)")
        if self.window and not self.keep_diagonal:
            raise ValueError(f"window={self.window} includes the diagonal; leave keep_diagonal on, or use window=0")
        for expert in (0, 1):
            self.schedule_for(expert)

    def schedule_for(self, expert: int) -> Schedule:
        """The schedule of expert 0 (the only, or high-noise one) or 1 (low-noise)."""
        kind, topk, table = self.schedule, self.topk, self.schedule_table
        if expert == 1:
            kind = self.schedule_2 or kind
            topk = topk if self.topk_2 is None else self.topk_2
            table = self.schedule_table_2 or (table if kind == "table" else ())
        return Schedule(topk, kind, table, self.dense_steps, self.dense_layers)

    def check_read(self, names: Collection[str], preset: str | None = None) -> None:
        """Refuse those of the fields `names`, which were asked for, that nothing reads beside the others.

        Args:
            names: of the fields that were given.
            preset: the name of the one whose values the others are, if one was given.

        Raises:
            ValueError: with what to leave out.
        """
        asked = {*names, *PRESETS.get(preset or "", ())}
        tables = [self.schedule_for(expert).kind == "table" for expert in (0, 1)]
        for name, is_table in (("topk", tables[0] and (tables[1] or self.topk_2 is not None)), ("topk_2", tables[1])):
            value = getattr(self, name)
            if name not in asked or value is None:
                continue
            if is_table:
                raise ValueError(
                    f"{name}={value:g} changes nothing beside a schedule table, which has densities of its own; "
                    f"{_leave_out(name, name in names, preset)}, or choose another schedule"
                )
            if self.selector == "window" and value < 1:
                raise ValueError(
                    f"{name}={value:g} changes nothing with selector 'window', which keeps its blocks whatever the "
                    f"density; {_leave_out(name, name in names, preset)}, or choose selector 'topk'"
                )

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add `--sparse-attn-…` flags, `_` for `-` accepted; one that is not given stays absent from the namespace."""
        group = parser.add_argument_group("sparse attention")
        add_flags(group, cls, FLAG_PREFIX)
        name = f"{FLAG_PREFIX}preset"
        group.add_argument(
            flag_of(name), dest=name, choices=tuple(PRESETS), default=argparse.SUPPRESS, help=PRESET_HELP
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SparseAttentionConfig:
        """From `{"topk": 0.3, …}`, refusing unknown names; texts are read as the flags are. `preset` is one of PRESETS."""
        known = {entry.name for entry in fields(cls)}
        values = _with_preset(values)
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown sparse attention options {', '.join(unknown)}; known are {', '.join(sorted(known | {'preset'}))}"
            )
        parsers = {entry.name: entry.metadata["parse"] for entry in fields(cls)}
        return cls(**{n: parsers[n](v) if isinstance(v, str) else v for n, v in values.items()})

    @classmethod
    def from_flags(cls, namespace: argparse.Namespace) -> SparseAttentionConfig:
        """From a namespace that `add_flags` filled, refusing a flag that nothing reads beside the others."""
        given = vars(namespace)
        names = [*(entry.name for entry in fields(cls)), "preset"]
        values = {name: given[FLAG_PREFIX + name] for name in names if FLAG_PREFIX + name in given}
        config = cls(**_with_preset(values))
        config.check_read(values, values.get("preset"))
        return config


def _leave_out(name: str, given: bool, preset: str | None) -> str:
    """What to leave out so that nothing gives the field `name`."""
    brought = PRESETS.get(preset or "", {})
    if name not in brought:
        return f"leave {name} out"
    rest = ", ".join(f"{other} {value}" for other, value in brought.items() if other not in (name, "schedule"))
    what = f"{name} and preset {preset!r}" if given else f"preset {preset!r}"
    return f"leave out {what}, which brings {name}, and give the rest of it ({rest})"


def _with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, over those of the preset among them."""
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not known; use one of {', '.join(PRESETS)}")
    if values.get("backend") == "none":
        raise ValueError(
            f"preset {name!r} makes attention sparse, and backend 'none' leaves it dense; leave one of them out"
        )
    return {**PRESETS[name], **values}
