"""Rank 0 takes job after job and leads the other ranks through it; they follow."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

from sp_sparse.serve.backend import JobParameters, Measured
from sp_sparse.serve.control import CANCEL, GO_ON, INTERRUPT, Control
from sp_sparse.serve.disk import StoreError
from sp_sparse.serve.jobs import PHASES, Job, JobError, Progress
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.runner import Bounds, JobFailedError, JobRunner, JobStoppedError, Observer, job_error
from sp_sparse.serve.store import JobStore
from sp_sparse.serve.watchdog import Watchdog

log = logging.getLogger(__name__)

_STOP, _IDLE = "stop", "idle"


class RunningJob(Observer):
    """The job that runs: its progress for clients, and their wish to stop it. Read and set from any thread."""

    def __init__(self, job_id: str, steps: int, expected: dict[str, float], metrics: Metrics) -> None:
        """`expected` are the seconds that phases took for a video of this size, where one was made."""
        self.id = job_id
        self.seconds: dict[str, float] = {}
        self.progress = Progress("encode", 0, 1, 0, steps)
        self.cancelled = threading.Event()
        self.interrupt_at = float("inf")
        self._expected, self._metrics = expected, metrics
        self._phase_began = self._last = time.perf_counter()
        self._step_seconds: list[float] = []

    def command(self) -> int:
        if self.cancelled.is_set():
            return CANCEL
        return INTERRUPT if time.monotonic() > self.interrupt_at else GO_ON

    def phase(self, name: str, parts: int) -> None:
        now = time.perf_counter()
        if name != self.progress.phase:
            self._end_phase(now)
            self._phase_began = self._last = now
        self.progress = replace(self.progress, phase=name, part=0, parts=parts)
        self.progress = replace(self.progress, eta_s=self._eta())

    def part(self) -> None:
        progress = replace(self.progress, part=self.progress.part + 1)
        if progress.phase == "denoise":
            now = time.perf_counter()
            self._step_seconds.append(now - self._last)
            self._metrics.step(now - self._last)
            self._last = now
            later = self._step_seconds[1:] or self._step_seconds
            progress = replace(progress, step=progress.part, seconds_per_step=sum(later) / len(later))
        self.progress = progress
        self.progress = replace(progress, eta_s=self._eta())

    def finish(self) -> None:
        """The last phase has ended."""
        self._end_phase(time.perf_counter())

    def _end_phase(self, now: float) -> None:
        self.seconds[self.progress.phase] = now - self._phase_began
        self._metrics.phase(self.progress.phase, now - self._phase_began)

    def _eta(self) -> float | None:
        """Seconds left: of this phase by the pace so far, of the others as they took for the last video of this size."""
        progress, names = self.progress, list(PHASES)
        share_left = 1 - progress.part / max(progress.parts, 1)
        if progress.phase == "denoise" and progress.seconds_per_step is not None:
            left = (progress.steps - progress.step) * progress.seconds_per_step
        elif progress.phase in self._expected:
            left = self._expected[progress.phase] * share_left
        else:
            return None
        later = names[names.index(progress.phase) + 1 :]
        return left + sum(self._expected.get(name, 0.0) for name in later)


class Engine:
    """Rank 0: the loop over jobs, and what other threads may ask of it."""

    def __init__(
        self,
        store: JobStore,
        runner: JobRunner,
        control: Control,
        watchdog: Watchdog,
        bounds: Bounds,
        metrics: Metrics,
        heartbeat_s: float = 1.0,
    ) -> None:
        """`heartbeat_s`: how often the other ranks are told that there is nothing to do."""
        self._store, self._runner, self._control, self._metrics = store, runner, control, metrics
        self._watchdog, self._bounds, self._heartbeat_s = watchdog, bounds, heartbeat_s
        self._wake = threading.Event()
        self._drain_until: float | None = None
        self._running: RunningJob | None = None
        self._expected: dict[tuple[int, ...], dict[str, float]] = {}
        self._complained = False
        self.ready = False

    @property
    def running(self) -> RunningJob | None:
        return self._running

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop a job at its next step, if it runs."""
        running = self._running
        if running is not None and running.id == job_id:
            running.cancelled.set()

    def drain(self, seconds: float) -> None:
        """Take no further job; one that has not ended after so many seconds is interrupted, to run after the next start."""
        self._drain_until = time.monotonic() + seconds
        if self._running is not None:
            self._running.interrupt_at = self._drain_until
        self._wake.set()

    def warm_up(self, job: JobParameters) -> None:
        """Run a job that nobody asked for and throw the video away. Rank 0's part of `follow`."""
        target = self._store.video_path(f"warm-up_{uuid.uuid4().hex}")
        self._running = RunningJob("warm-up", job.num_inference_steps, {}, Metrics())
        try:
            self._control.broadcast(job)
            self._runner.run(job, target, self._running)
        except JobFailedError as failed:
            log.warning("the warm-up failed (%s): %s", failed.error.code, failed.error.message)
        except JobStoppedError:
            log.info("the warm-up was interrupted")
        finally:
            self._running = None
            target.unlink(missing_ok=True)

    def run(self, is_well: Callable[[], bool] = lambda: True) -> None:
        """Serve until drained; `is_well` is asked between jobs whether to go on at all.

        Raises:
            RuntimeError: not well any more.
        """
        self.ready = True
        try:
            while not self.draining:
                taken = self._next()
                if taken is None:
                    self._control.broadcast(_IDLE)
                else:
                    self._serve(*taken)
                if not is_well():
                    raise RuntimeError("the web server has stopped; ending, so that the ranks can start anew")
        finally:
            self.ready = False
        self._control.broadcast(_STOP)

    def _next(self) -> tuple[Job, JobParameters] | None:
        """The next job; None if none comes within a heartbeat, by which the other ranks know that this one lives."""
        with self._watchdog.limit(self._bounds.step_s, "looking for the next job"):
            self._wake.clear()  # before looking: a job that comes after the look wakes
            taken = self._take()
            if taken is None:
                self._wake.wait(self._heartbeat_s)
                taken = None if self.draining else self._take()
            return taken

    def _take(self) -> tuple[Job, JobParameters] | None:
        """The next job; None where the store cannot say: there is another look after the next heartbeat."""
        try:
            taken = self._store.start_next()
        except StoreError as error:
            self._complain(error)
            return None
        self._complained = False
        return taken

    def _complain(self, error: StoreError) -> None:
        """Once until it is well again."""
        if not self._complained:
            log.error("no job is taken or ended until this is mended: %s", error)
        self._complained = True

    def _serve(self, job: Job, parameters: JobParameters) -> None:
        size = (parameters.height, parameters.width, parameters.num_frames)
        running = RunningJob(job.id, parameters.num_inference_steps, self._expected.get(size, {}), self._metrics)
        self._running = running
        if self._drain_until is not None:  # asked for before there was a running job to tell
            running.interrupt_at = self._drain_until
        if self._was_deleted(job.id):  # before there was a running job to tell
            running.cancelled.set()
        log.info("%s: started (try %d)", job.id, job.tries)
        try:
            self._control.broadcast(parameters)
            measured = self._runner.run(parameters, self._store.video_path(job.id), running)
            running.finish()
            self._expected[size] = running.seconds
            self._complete(job.id, running, measured)
        except JobFailedError as failed:
            self._fail(job.id, failed.error)
        except JobStoppedError as stopped:
            if stopped.command == CANCEL:
                self._write(partial(self._store.remove, job.id))
                self._metrics.cancelled()
                log.info("%s: cancelled", job.id)
            else:
                self._write(partial(self._store.requeue, job.id))
                log.info("%s: interrupted, to run after the next start", job.id)
        finally:
            self._running = None

    def _was_deleted(self, job_id: str) -> bool:
        try:
            stored = self._store.get(job_id)
        except StoreError as error:
            self._complain(error)
            return False
        return stored is None or stored.cancelling

    def _complete(self, job_id: str, running: RunningJob, measured: Measured) -> None:
        try:
            self._write(partial(self._store.complete, job_id, _result(running, measured)))
        except OSError as error:  # the video itself did not reach the disk
            log.exception("%s: the video cannot be kept", job_id)
            self._fail(job_id, job_error(error))
            return
        self._metrics.completed(measured)
        log.info("%s: completed in %.2f s", job_id, sum(running.seconds.values()))

    def _fail(self, job_id: str, error: JobError) -> None:
        self._write(partial(self._store.fail, job_id, error))
        self._metrics.failed(error.code)
        log.warning("%s: failed (%s): %s", job_id, error.code, error.message)

    def _write(self, write: Callable[[], None]) -> None:
        """Write down how a job ended, however long the disk is full or the database cannot be had; meanwhile others wait.

        At a shutdown it is left to the next start, which finds a finished video by its file.
        """
        while True:
            try:
                write()
            except StoreError as error:
                self._complain(error)
            else:
                self._complained = False
                return
            if self.draining:
                return
            self._control.broadcast(_IDLE)
            time.sleep(self._heartbeat_s)


def follow(control: Control, runner: JobRunner, watchdog: Watchdog, bounds: Bounds) -> None:
    """Every rank but 0: do what rank 0 says until it says stop."""
    while True:
        with watchdog.limit(bounds.step_s, "waiting for rank 0"):
            message = control.broadcast()
        if message == _STOP:
            return
        if isinstance(message, JobParameters):
            with suppress(JobFailedError, JobStoppedError):  # rank 0 writes it down
                runner.run(message, None, Observer())


def _result(running: RunningJob, measured: Measured) -> dict[str, object]:
    return {
        "stage_durations": running.seconds,
        "seconds_per_step": running.progress.seconds_per_step,
        **asdict(measured),
    }
