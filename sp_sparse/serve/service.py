"""What the handlers of requests work with: the jobs of a server, and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sp_sparse.serve.answers import ApiError, VideoAnswer, invalid, not_found, video_answer
from sp_sparse.serve.backend import JobParameters, VideoBackend
from sp_sparse.serve.engine import Engine
from sp_sparse.serve.images import Decoders
from sp_sparse.serve.jobs import IN_PROGRESS, QUEUED, Job
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.store import JobStore, QueueFullError


@dataclass(frozen=True)
class Service:
    """What the handlers work with.

    Attributes:
        keep_s: seconds that a video is kept.
        host: name or address that the server listens on.
        decoders: decode the images of requests; of this process, for threads do not outlive a fork.
    """

    backend: VideoBackend
    store: JobStore
    engine: Engine
    limits: Limits
    metrics: Metrics
    keep_s: float
    host: str
    api_key: str | None
    decoders: Decoders = field(default_factory=Decoders)

    def answer(self, job: Job) -> VideoAnswer:
        running = self.engine.running
        progress = running.progress if running is not None and running.id == job.id else None
        ahead = self.store.ahead_of(job) if job.status == QUEUED else None
        return video_answer(job, self.backend.card, progress if job.status == IN_PROGRESS else None, ahead, self.keep_s)

    def job(self, job_id: str) -> Job:
        job = self.store.get(job_id)
        if job is None:
            raise not_found(job_id)
        return job

    def add(self, parameters: JobParameters) -> Job:
        """Store a job and wake the engine."""
        try:
            self.backend.check(parameters)
        except ValueError as error:
            raise invalid(str(error)) from error
        if self.engine.draining:
            raise ApiError(
                503, "the server is shutting down; try again soon", "draining", headers={"Retry-After": "30"}
            )
        try:
            job = self.store.add(parameters, self.limits.queue)
        except QueueFullError as error:
            self.metrics.rejected()
            text = f"{self.limits.queue} jobs wait already; try again later"
            raise ApiError(429, text, "queue_full", headers={"Retry-After": str(self._retry_after())}) from error
        self.engine.wake()
        return job

    def delete(self, job_id: str) -> None:
        try:
            deleted = self.store.delete(job_id)
        except KeyError as error:
            raise not_found(job_id) from error
        except ValueError as error:
            raise ApiError(409, str(error), "cancelling") from error
        if deleted == "cancelling":
            self.engine.cancel(job_id)

    def _retry_after(self) -> int:
        """When the running job is expected to make room."""
        running = self.engine.running
        eta = None if running is None else running.progress.eta_s
        return max(1, min(600, round(10 if eta is None else eta)))
