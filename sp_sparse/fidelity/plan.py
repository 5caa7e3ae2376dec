"""What is compared: every combination of the lists that are given, and which of them each one is measured against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from sp_sparse import SparseAttentionConfig
from sp_sparse.config import FLAG_PREFIX
from sp_sparse.generate.arguments import sparse_config

# The bound that no selector beats in mass, under a name that one likes to write.
MASS = "mass"
_SELECTORS = {MASS: "sp_sparse.fidelity.mass:BlockMassSelector"}


@dataclass(frozen=True)
class Setting:
    """One way to make attention sparse. The schedule is constant after the dense steps.

    Attributes:
        selector, remainder, order, dense_steps, block_size, keep_diagonal, keep_first_frame, density: as the fields of
            `SparseAttentionConfig` that they set; `order` is the token order, `density` the density asked for.
    """

    selector: str
    remainder: str
    order: str
    dense_steps: int
    block_size: tuple[int, int]
    keep_diagonal: bool
    keep_first_frame: bool
    density: float

    def config(self, backend: str) -> SparseAttentionConfig:
        """As the layers take it.

        Raises:
            ValueError: values that the configuration refuses.
        """
        return SparseAttentionConfig.from_mapping(
            {
                "backend": backend,
                "topk": self.density,
                "schedule": "constant",
                "dense_steps": self.dense_steps,
                "selector": _SELECTORS.get(self.selector, self.selector),
                "remainder": self.remainder,
                "keep_diagonal": self.keep_diagonal,
                "keep_first_frame": self.keep_first_frame,
                "block_size": self.block_size,
                "token_order": self.order,
            }
        )

    @property
    def variant(self) -> Setting:
        """All but the density, for which 0 stands: what makes one line of a plot."""
        return replace(self, density=0.0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "block_size": list(self.block_size)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        return cls(**{**values, "block_size": tuple(values["block_size"])})


@dataclass(frozen=True)
class SettingLists:
    """The values that each part of a setting takes; a setting is one of each.

    Raises:
        ValueError: an empty list.
    """

    selector: tuple[str, ...]
    remainder: tuple[str, ...]
    order: tuple[str, ...]
    dense_steps: tuple[int, ...]
    block_size: tuple[tuple[int, int], ...]
    keep_diagonal: tuple[bool, ...]
    keep_first_frame: tuple[bool, ...]
    density: tuple[float, ...]

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not getattr(self, entry.name):
                raise ValueError(f"the list of {entry.name} is empty; give at least one value")

    def settings(self) -> tuple[Setting, ...]:
        """Every combination, once."""
        names = [entry.name for entry in fields(self)]
        combinations = product(*(getattr(self, name) for name in names))
        return tuple(dict.fromkeys(Setting(**dict(zip(names, values, strict=True))) for values in combinations))

    def baseline(self, text: str | None) -> Baseline:
        """What `--baseline` names; by default the first value of every list but that of the densities.

        Raises:
            ValueError: an unknown part, or a value that is not in its list.
        """
        lists = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if text is None:
            return Baseline({name: values[0] for name, values in lists.items() if name != "density"})
        parts = {}
        for item in text.split(","):
            name, _, told = (x.strip() for x in item.partition("="))
            if name not in lists:
                raise ValueError(f"--baseline {text}: {name!r} is not known; name some of {', '.join(lists)}")
            known = {told_value(value): value for value in lists[name]}
            if told not in known:
                raise ValueError(
                    f"--baseline {text}: {name} {told!r} is not measured; use one of {', '.join(known)}, or add it to "
                    "its list"
                )
            parts[name] = known[told]
        return Baseline(parts)


@dataclass(frozen=True)
class Baseline:
    """Each setting is compared with its twin: the one with these parts instead of its own."""

    parts: Mapping[str, Any]

    def twin(self, setting: Setting) -> Setting:
        return replace(setting, **self.parts)

    def told(self, settings: Sequence[Setting]) -> str:
        """In words, without the parts that all settings share."""
        varying = {name for name in self.parts if len({getattr(setting, name) for setting in settings}) > 1}
        return ", ".join(
            f"{name}={told_value(value)}" for name, value in self.parts.items() if name in (varying or self.parts)
        )


def default_block_size(model: str) -> tuple[int, int]:
    """The block size that `generate` would take for a model."""
    return sparse_config({"model": model, FLAG_PREFIX + "backend": "auto"}).block_size


def key_of(*values: Any) -> str:
    """A short name of some values for files, the same in every run."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def labels(settings: Sequence[Setting]) -> dict[Setting, str]:
    """What tables and plots call each setting: selector, remainder, density and all else that is not the same for all."""
    varying = [entry.name for entry in fields(Setting) if len({getattr(s, entry.name) for s in settings}) > 1]
    return {setting: _label(setting, varying) for setting in settings}


def _label(setting: Setting, varying: Sequence[str]) -> str:
    told = {
        "selector": setting.selector.rpartition(":")[2],
        "remainder": setting.remainder,
        "order": setting.order,
        "block_size": f"blocks {told_value(setting.block_size)}",
        "dense_steps": f"{setting.dense_steps} dense steps",
        "keep_diagonal": "diagonal" if setting.keep_diagonal else "no diagonal",
        "keep_first_frame": "first frame" if setting.keep_first_frame else "no first frame",
    }
    parts = [text for name, text in told.items() if name in ("selector", "remainder") or name in varying]
    if setting.density:
        parts.append(f"d={setting.density:g}")
    return ", ".join(parts)


def told_value(value: Any) -> str:
    """One value of a list as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
