"""Results as `--output` wrote them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_NEEDED = ("what", "gpus", "ulysses", "ring", "sequence", "density", "kernel", "ms_median", "speedup")


def read_results(paths: Sequence[Path]) -> list[Row]:
    """The rows of several files; the latest of equal measurements counts.

    Raises:
        ValueError: a file that holds anything else.
    """
    return list({identity(row): row for path in paths for row in _read(path)}.values())


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); give a file that --output wrote") from error
        missing = [key for key in _NEEDED if key not in row] if isinstance(row, dict) else list(_NEEDED)
        if missing:
            raise ValueError(
                f"{path} line {number} has no {', '.join(missing)}; give a file that `benchmark.py attention` or "
                "`benchmark.py transformer` wrote"
            )
        rows.append(row)
    return rows


def identity(row: Row) -> tuple[Any, ...]:
    """What two measurements of the same have in common."""
    optional = (
        "density_asked",
        "block_size",
        "backend",
        "implementation",
        "compiled",
        "layers",
        "hardware",
        "kv_exchange",
    )
    return tuple(row[key] for key in _NEEDED[:7]) + tuple(row.get(key) for key in optional)
