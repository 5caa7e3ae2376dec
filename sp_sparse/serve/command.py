"""The server on every rank, from its arguments to its end, and what rank 0 alone has."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from sp_sparse.generate.ranks import Ranks
from sp_sparse.serve.api import create_app
from sp_sparse.serve.arguments import ServeArguments
from sp_sparse.serve.control import Control
from sp_sparse.serve.engine import Engine, follow
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.runner import Bounds, JobRunner
from sp_sparse.serve.service import Service
from sp_sparse.serve.stop import Stop
from sp_sparse.serve.store import JobStore
from sp_sparse.serve.wan import WanBackend
from sp_sparse.serve.watchdog import Watchdog
from sp_sparse.serve.web import WebServer, check_uvicorn, listen

_HOUSEKEEPING_S = 30.0

# After a failure, the other ranks hear of it within this and the step they are in, or never.
_FAULT_S = 30.0

log = logging.getLogger("sp_sparse.serve")


def serve(arguments: ServeArguments, stop: Stop, ranks: Ranks) -> int:
    """Serve until `stop` has drained it; every rank calls it with the same arguments.

    Returns:
        0.
    """
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
    return 0


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

    def run(self, stop: Stop) -> None:
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
