"""Waiting for other processes, and finding those that torchrun started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing here asserts a time: this only ends a test that would never end.
PATIENCE_S = 120.0


def wait_for(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE_S) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        time.sleep(0.03)
    return value


def process_of_rank(parent: int, rank: int) -> int | None:
    """The child of torchrun that has this rank; None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_child = process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1] == str(parent)
            if is_child and f"\0RANK={rank}\0".encode() in process.joinpath("environ").read_bytes():
                return int(process.name)
        except OSError:
            continue  # it ended meanwhile
    return None
