"""Numbers for Prometheus, in a registry of their own."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sp_sparse.serve.backend import Measured
from sp_sparse.serve.jobs import IN_PROGRESS, QUEUED

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """What the server did since it started. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._jobs = Counter("sp_sparse_jobs", "Jobs that ended", ["status"], registry=registry)
        self._failures = Counter("sp_sparse_failures", "Failed jobs by error code", ["code"], registry=registry)
        self._steps = Histogram(
            "sp_sparse_step_seconds", "Seconds of a denoising step", registry=registry, buckets=_SECONDS
        )
        self._phases = Histogram(
            "sp_sparse_phase_seconds", "Seconds of a phase", ["phase"], registry=registry, buckets=_SECONDS
        )
        self._density = Gauge("sp_sparse_density", "Attended share of the pairs, of the last job", registry=registry)
        self._memory = Gauge("sp_sparse_peak_memory_bytes", "Peak of a rank, of the last job", registry=registry)
        self._queued = Gauge("sp_sparse_queued_jobs", "Jobs that wait", registry=registry)
        self._running = Gauge("sp_sparse_running_jobs", "Jobs that run", registry=registry)
        self._ready = Gauge("sp_sparse_ready", "1 if jobs are being taken", registry=registry)
        self._requests = Counter(
            "sp_sparse_http_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self._rejections = Counter("sp_sparse_rejected_jobs", "Jobs refused as the queue was full", registry=registry)
        restarts = Gauge("sp_sparse_restarts", "Times torchrun started the ranks anew", registry=registry)
        restarts.set(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    def step(self, seconds: float) -> None:
        self._steps.observe(seconds)

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)

    def completed(self, measured: Measured) -> None:
        self._jobs.labels("completed").inc()
        self._density.set(1.0 if measured.density is None else measured.density)
        self._memory.set(measured.peak_bytes)

    def failed(self, code: str) -> None:
        self._jobs.labels("failed").inc()
        self._failures.labels(code).inc()

    def cancelled(self) -> None:
        self._jobs.labels("cancelled").inc()

    def rejected(self) -> None:
        self._rejections.inc()

    def answered(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, str(status)).inc()

    def exposition(self, counts: dict[str, int], ready: bool) -> bytes:
        """Everything in Prometheus's text format, with the queue as it is now."""
        self._queued.set(counts[QUEUED])
        self._running.set(counts[IN_PROGRESS])
        self._ready.set(ready)
        return generate_latest(self._registry)
