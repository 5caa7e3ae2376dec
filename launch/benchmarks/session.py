"""A run of several measurements: what is measured is kept at once, and what fails or comes too late is told."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from launch.benchmarks.results import Measurement, environment, table
from sp_sparse.generate.files import check_writable
from sp_sparse.generate.ranks import Ranks
from sp_sparse.parallel.agreement import RefusedError, together

T = TypeVar("T")

_LONGEST_REASON = 500


class Session:
    """Takes measurements one after the other, on all ranks alike."""

    def __init__(self, ranks: Ranks, output: Path | None, time_limit_s: float | None) -> None:
        self.ranks = ranks
        self._output, self._limit = output, time_limit_s
        self._start = time.perf_counter()
        self._environment = environment(ranks.device)
        self._rows: list[dict[str, Any]] = []
        self._skipped: list[str] = []
        self._failed: list[str] = []
        if output is not None and ranks.first:
            check_writable(output)

    def measure(self, label: str, take: Callable[[], Measurement]) -> Measurement | None:
        """Take a measurement and write it; None if the time is over or it failed on some rank. A collective call."""
        if not self.in_time(label):
            return None
        began = time.perf_counter()
        measurement = self.attempt(label, take)
        if measurement is None:
            return None
        row = measurement.to_json(self._environment)
        self._rows.append(row)
        if self._output is not None and self.ranks.first:
            with self._output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.ranks.say(f"{label}: {row['ms_median']:.2f} ms (measuring took {time.perf_counter() - began:.1f} s)")
        return measurement

    def attempt(self, label: str, action: Callable[[], T]) -> T | None:
        """Do something; if it fails on some rank, tell so on all of them and return None. A collective call."""
        try:
            return together(action, self.ranks.groups)  # any Exception: a compiler may raise what it likes
        except RefusedError as refused:
            free_memory()
            self._failed.append(f"{label}: {' '.join(refused.failure.split())[:_LONGEST_REASON]}")
            self.ranks.say(f"left out: {self._failed[-1]}")
            return None

    def in_time(self, label: str) -> bool:
        """Whether something may still be started; if not, `label` is told at the end. A collective call."""
        if self._limit is None:
            return True
        # The first rank's clock decides, or some ranks would go on without the others.
        in_time = self.ranks.gather(time.perf_counter() - self._start)[0] < self._limit
        if not in_time:
            self._skipped.append(label)
        return in_time

    def finish(self) -> int:
        """Tell what is missing, then print the table.

        Returns:
            0, or 1 if a measurement failed; one that the time limit skipped is no failure.
        """
        if self.ranks.first:
            for failed in self._failed:
                print(f"left out: {failed}")
            for skipped in self._skipped:
                print(f"skipped, over --time-limit-s {self._limit:g}: {skipped}")
            print(table(self._rows) if self._rows else "nothing was measured", flush=True)
        return 1 if self._failed else 0


def free_memory() -> None:
    """Give back what is not referenced, to measure the next thing's peak or to get over a lack of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
