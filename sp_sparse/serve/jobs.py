"""The life of a job: its states, its phases, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"

# Of a job in progress, with the percentage at which each begins and ends.
PHASES = {"encode": (0, 2), "denoise": (2, 90), "decode": (90, 98), "save": (98, 100)}


@dataclass(frozen=True)
class JobError:
    """Why a job failed, fit for the eyes of a client.

    Attributes:
        code: `out_of_memory`, `no_room`, `not_finite`, `invalid_request`, `interrupted` or `internal_error`.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Progress:
    """How far a running job has come.

    Attributes:
        part, parts: of the phase: steps of `denoise`, latent frames (of each tile) of `decode`.
        step, steps: denoising steps done, and of how many.
        seconds_per_step: mean over the steps after the first, which may prepare and compile; None before there is one.
        eta_s: seconds that are left; None where nothing is known.
    """

    phase: str
    part: int
    parts: int
    step: int
    steps: int
    seconds_per_step: float | None = None
    eta_s: float | None = None

    @property
    def percent(self) -> int:
        """0 to 99: a job is at 100 when its video can be fetched."""
        first, last = PHASES[self.phase]
        return min(99, first + (last - first) * self.part // max(self.parts, 1))


@dataclass(frozen=True)
class Job:
    """A job as it is stored.

    Attributes:
        number: grows with every job; the queue runs by it.
        cancelling: was deleted while it ran, and goes as soon as it has stopped.
        tries: how often it was started.
        parameters: fields of `JobParameters`, without the image.
        result: of a completed job: `stage_durations`, `density`, …
        created_at, started_at, completed_at: Unix time in seconds.
    """

    number: int
    id: str
    status: str
    cancelling: bool
    tries: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    parameters: dict[str, Any]
    error: JobError | None
    result: dict[str, Any] = field(default_factory=dict)
    has_image: bool = False
