"""How far a long measurement is."""

from __future__ import annotations

import time

from sp_sparse.generate.ranks import Ranks


class Progress:
    """Tells each step on rank 0, with the time that is left if the rest takes as long as this run's steps did."""

    def __init__(self, ranks: Ranks, total: int, done: int) -> None:
        """`done` of `total` steps were there before this run."""
        self._ranks, self._total, self._done, self._before = ranks, total, done, done
        self._start = time.perf_counter()
        if done:
            ranks.say(f"{done} of {total} are there already")

    def step(self, text: str) -> None:
        """One more is done."""
        self._done += 1
        each = (time.perf_counter() - self._start) / (self._done - self._before)
        left = told_time(each * (self._total - self._done))
        self._ranks.say(f"{self._done} of {self._total}: {text}; {left} left")


def told_time(seconds: float) -> str:
    """`2 h 05 min`, `3 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
