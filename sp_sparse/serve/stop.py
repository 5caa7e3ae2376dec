"""What ends the server when it is told to stop, within bounds."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from sp_sparse.generate.ranks import rank_from_environment

# Beyond the time that a running job has after SIGTERM.
_GRACE_S = 5.0


class Stop:
    """What SIGTERM and SIGINT do: drain, within bounds. Before there is anything to drain, the process ends."""

    def __init__(self, drain_s: float) -> None:
        self.drain: Callable[[float], None] | None = None
        self._drain_s = drain_s
        self._asked = False

    def ask(self) -> None:
        """Only the first time counts: torchrun and a terminal both send the signal on."""
        if self._asked:
            return
        self._asked = True
        if self.drain is None:
            self._end()
        else:
            self.drain(self._drain_s)
            timer = threading.Timer(self._drain_s + _GRACE_S, self._end)
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        print(f"rank {rank_from_environment()}: error: stopped by a signal", file=sys.stderr, flush=True)
        os._exit(1)
