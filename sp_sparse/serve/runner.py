"""One job as every rank runs it: the same phases and the same exchanges, whatever happens on one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import NoReturn, TypeVar

from sp_sparse.generate.memory import is_out_of_memory
from sp_sparse.parallel.agreement import is_lost_rank
from sp_sparse.serve.backend import JobParameters, Measured, NotFiniteError, VideoBackend
from sp_sparse.serve.control import CANCEL, FAILED, GO_ON, INTERRUPT, Control
from sp_sparse.serve.disk import is_no_room
from sp_sparse.serve.jobs import JobError
from sp_sparse.serve.watchdog import Watchdog

T = TypeVar("T")

log = logging.getLogger(__name__)


class Observer:
    """What rank 0 is told of a running job, and is asked about it; as it is, for ranks that only follow, it does nothing."""

    def command(self) -> int:
        """GO_ON, or CANCEL or INTERRUPT for the job to stop. Asked between steps."""
        return GO_ON

    def phase(self, name: str, parts: int) -> None:
        """A phase begins."""

    def part(self) -> None:
        """A step, or a part of decoding, is done."""


class JobFailedError(Exception):
    """The job failed, and every rank knows it."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class JobStoppedError(Exception):
    """Rank 0 stopped the job, on every rank at the same place.

    Attributes:
        command: CANCEL or INTERRUPT.
    """

    def __init__(self, command: int) -> None:
        super().__init__(command)
        self.command = command


class _PeerFailedError(Exception):
    """Another rank said FAILED where this one said something else."""


@dataclass(frozen=True)
class Bounds:
    """Seconds after which a process ends itself.

    Attributes:
        step_s: that a step or a phase without steps may take.
        fault_s: that the other ranks may take to hear of a failure, beyond what a step takes: those that sit in a
            collective never do. Only where a video of the kind was made: before that a step may compile, and has `step_s`.
    """

    step_s: float
    fault_s: float


def job_error(caught: Exception) -> JobError:
    """What clients are told of an exception."""
    if is_out_of_memory(caught):
        text = "the server ran out of memory; ask for a smaller or shorter video"
        if flags := [remedy for remedy in getattr(caught, "remedies", ()) if remedy.startswith("--")]:
            text += f", or have it started with {' or '.join(flags)}"
        return JobError("out_of_memory", text)
    if is_no_room(caught):
        return JobError("no_room", "the server's disk is full; delete videos or ask again when there is room")
    if isinstance(caught, NotFiniteError):
        return JobError("not_finite", str(caught))
    if isinstance(caught, ValueError):
        return JobError("invalid_request", f"this video cannot be made: {caught}")
    return JobError("internal_error", "the server failed to make this video; its log tells why")


class JobRunner:
    """Runs jobs. A failure on any rank is agreed on by all, so that it ends the job and nothing else.

    A rank that fails within a collective leaves the others waiting in it: then nothing can be agreed on, the watchdog ends
    the processes, and torchrun starts them anew.
    """

    def __init__(self, backend: VideoBackend, control: Control, watchdog: Watchdog, bounds: Bounds) -> None:
        self._backend, self._control, self._watchdog, self._bounds = backend, control, watchdog, bounds

        self._longest: dict[JobParameters, float] = {}  # seconds without a word, of kinds of videos that were made
        self._fault_s, self._last_word, self._silence = bounds.step_s, 0.0, 0.0

    def run(self, job: JobParameters, target: Path | None, observer: Observer) -> Measured:
        """Make a video, on rank 0 into `target`, which the others do not read. A collective call.

        Raises:
            JobFailedError, JobStoppedError: on every rank alike.
        """
        kind = replace(job, prompt="", negative_prompt="", seed=0, image=None if job.image is None else b"")
        self._fault_s = self._bounds.step_s
        if kind in self._longest:
            self._fault_s = min(self._bounds.step_s, self._bounds.fault_s + 2 * self._longest[kind])
        self._last_word, self._silence = monotonic(), 0.0
        try:
            measured = self._run(job, target, observer)
            self._longest[kind] = self._silence
            return measured
        except JobFailedError:
            with self._watchdog.limit(self._fault_s, "cleaning up after a failed job"):
                self._backend.recover()
            raise

    def _run(self, job: JobParameters, target: Path | None, observer: Observer) -> Measured:
        backend = self._backend

        def on_step() -> None:
            self._watchdog.beat()
            observer.part()
            self._agree(observer.command())

        def on_part(done: int, parts: int) -> None:
            if done == 1:
                observer.phase("decode", parts)
            on_step()

        encoded = self._on_all("encode", 1, observer, lambda: backend.encode(job))
        steps = job.num_inference_steps
        latents = self._on_all("denoise", steps, observer, lambda: backend.denoise(job, encoded, on_step))
        measured = self._together(backend.measure, observer)
        frames = self._on_all("decode", 1, observer, lambda: backend.decode(latents, on_part))
        first = self._control.first
        self._on_all("save", 1, observer, lambda: backend.save(job, frames, _required(target)) if first else None)
        return measured

    def _on_all(self, name: str, parts: int, observer: Observer, action: Callable[[], T]) -> T:
        observer.phase(name, parts)
        with self._watchdog.limit(self._bounds.step_s, f"a step of {name}"):
            return self._together(action, observer)

    def _together(self, action: Callable[[], T], observer: Observer) -> T:
        """Do something on every rank, and fail on every rank if one fails."""
        error: JobError | None = None
        try:
            result = action()
        except (JobStoppedError, _PeerFailedError) as stopped:
            if isinstance(stopped, JobStoppedError):
                raise
        except Exception as caught:
            error = self._told(caught)
            with self._watchdog.limit(self._fault_s, f"telling the other ranks of a failure ({error.message})"):
                self._control.exchange(FAILED)
        else:
            try:
                self._agree(observer.command())
                return result
            except _PeerFailedError:
                pass
        self._fail(error)

    def _agree(self, code: int) -> list[int]:
        now = monotonic()
        self._silence, self._last_word = max(self._silence, now - self._last_word), now
        codes = self._control.exchange(code)
        if FAILED in codes:
            raise _PeerFailedError
        if codes[0] in (CANCEL, INTERRUPT):
            raise JobStoppedError(codes[0])
        return codes

    def _told(self, caught: Exception) -> JobError:
        """What clients are told of an exception; the log gets all of it. A rank that was lost is no failure of the job."""
        if is_lost_rank(caught):
            raise caught
        log.error("a job failed", exc_info=caught)
        return job_error(caught)

    def _fail(self, error: JobError | None) -> NoReturn:
        """Every rank learns the first failure, and raises it."""
        errors = [other for other in self._control.gather(error) if other is not None]
        raise JobFailedError(errors[0])


def _required(target: Path | None) -> Path:
    if target is None:
        raise TypeError("rank 0 needs to know where the video goes; pass a target")
    return target
