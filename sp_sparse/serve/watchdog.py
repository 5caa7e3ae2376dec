"""Ends a process whose main thread does not move on: a rank that waits for ever must not look alive."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep


@dataclass
class _Limit:
    seconds: float
    what: str
    ends: float


def end_process(text: str) -> None:
    """Say why, show where every thread stands, and end without tidying up, which could wait for ranks that are gone."""
    print(f"rank {os.environ.get('RANK', '0')}: error: {text}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    sys.stderr.flush()
    os._exit(1)


class Watchdog:
    """Bounds what the main thread does; a thread of its own calls `on_expiry` with a text when a bound is passed."""

    def __init__(self, on_expiry: Callable[[str], None] = end_process) -> None:
        self._on_expiry = on_expiry
        self._lock = threading.Lock()
        self._limits: list[_Limit] = []
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """What happens inside may take so many seconds since its start or the last `beat`; an outer bound rests."""
        with self._lock:
            self._limits.append(_Limit(seconds, what, monotonic() + seconds))
        try:
            yield
        finally:
            with self._lock:
                self._limits.pop()
            self.beat()

    def beat(self) -> None:
        """Start the innermost bound anew: there was progress."""
        with self._lock:
            if self._limits:
                self._limits[-1].ends = monotonic() + self._limits[-1].seconds

    def _watch(self) -> None:
        while True:
            sleep(0.2)
            with self._lock:
                late = self._limits[-1] if self._limits and self._limits[-1].ends < monotonic() else None
            if late is not None:
                self._on_expiry(
                    f"{late.what} took more than {late.seconds:g} s; ending, so that the ranks can start anew"
                )
                return
