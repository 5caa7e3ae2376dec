"""The server on every rank, from its arguments to its end: what rank 0 has, and how all of them stop."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sp_sparse.generate.console import report_error
from sp_sparse.generate.ranks import USER_ERRORS, Ranks, rank_from_environment, start_ranks
from sp_sparse.parallel.agreement import RefusedError
from sp_sparse.serve.api import create_app
from sp_sparse.serve.arguments import ServeArguments
from sp_sparse.serve.control import Control
from sp_sparse.serve.engine import Engine, follow
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.runner import Bounds, JobRunner
from sp_sparse.serve.service import Service
from sp_sparse.serve.store import JobStore
from sp_sparse.serve.watchdog import Watchdog
from sp_sparse.serve.web import WebServer, check_uvicorn, listen

if TYPE_CHECKING:
    from sp_sparse.serve.wan import WanBackend

_HOUSEKEEPING_S = 30.0

# After a failure, the other ranks hear of it within this and the step they are in, or never.
_FAULT_S = 30.0

# Beyond the time that a running job has after SIGTERM.
_GRACE_S = 5.0

log = logging.getLogger("sp_sparse.serve")


def serve(arguments: ServeArguments) -> int:
    """Serve until SIGTERM; returns the exit status of `main`."""
    stop = _Stop(arguments.drain_s)
    try:
        with start_ranks(arguments.device, arguments.timeout_s, stop.ask) as ranks:
            try:
                _serve(arguments, ranks, stop)
            except RefusedError as refused:
                if refused.speaks:
                    report_error(refused, arguments.timeout_s, arguments.debug)
                return 2
    except USER_ERRORS as error:
        return report_error(error, arguments.timeout_s, arguments.debug)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


class _Stop:
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


def _serve(arguments: ServeArguments, ranks: Ranks, stop: _Stop) -> None:
    from sp_sparse.serve.wan import WanBackend  # here, for diffusers reads the environment when it is imported

    ranks.check_same(arguments, but=("api_key",))
    backend = ranks.together(lambda: WanBackend(arguments, ranks))
    control = Control.of_all_ranks(ranks.rank, ranks.world, arguments.timeout_s)
    watchdog = Watchdog()
    bounds = Bounds(arguments.timeout_s, min(_FAULT_S, arguments.timeout_s))
    runner = JobRunner(backend, control, watchdog, bounds)
    server = ranks.together(
        lambda: _FirstRank(arguments, backend, runner, control, watchdog, bounds) if ranks.first else None
    )
    backend.load()
    if server is not None:
        server.run(stop)
    else:
        stop.drain = lambda seconds: None  # rank 0 tells when it is over
        follow(control, runner, watchdog, bounds)


class _FirstRank:
    """What only rank 0 has: jobs, HTTP and the engine."""

    def __init__(
        self,
        arguments: ServeArguments,
        backend: WanBackend,
        runner: JobRunner,
        control: Control,
        watchdog: Watchdog,
        bounds: Bounds,
    ) -> None:
        self._arguments, self._backend = arguments, backend
        check_uvicorn()
        listener = listen(arguments.host, arguments.port)
        self._store = JobStore(Path(arguments.data_dir), arguments.max_tries)
        found = self._store.recover()
        metrics = Metrics()
        self._engine = Engine(self._store, runner, control, watchdog, bounds, metrics)
        self._keep_s = arguments.keep_hours * 3600
        service = Service(
            backend,
            self._store,
            self._engine,
            arguments.limits,
            metrics,
            self._keep_s,
            arguments.host,
            arguments.api_key,
        )
        host, port = listener.getsockname()[:2]
        # From here on clients are answered, though the model has yet to load.
        self._web = WebServer(create_app(service), listener, arguments.client_timeout_s)
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if any(found.values()):
            log.info("left by the last server: %s", ", ".join(f"{count} {what}" for what, count in found.items()))

    def run(self, stop: _Stop) -> None:
        stop.drain = self._engine.drain
        threading.Thread(target=self._keep_house, name="housekeeping", daemon=True).start()
        if self._arguments.warmup_steps:
            self._engine.warm_up(self._backend.warm_up_job(self._arguments.warmup_steps))
        log.info("ready")
        self._engine.run(lambda: self._web.alive)
        self._web.close()
        self._store.close()
        log.info("drained")

    def _keep_house(self) -> None:
        while True:
            try:
                removed = self._store.expire(self._keep_s, int(self._arguments.keep_gb * 1e9))
                if removed:
                    log.info("%d old jobs removed", removed)
            except Exception:
                log.exception("old jobs cannot be removed")
            time.sleep(_HOUSEKEEPING_S)
