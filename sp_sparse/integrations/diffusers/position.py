"""Where the denoising loop is: as it tells `cache_context`, or else as the scheduler that it steps knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# timestep of a forward -> (step, number of steps), both None where unknown
StepSource = Callable[[Tensor], "tuple[int | None, int | None]"]


def no_steps(timestep: Tensor) -> tuple[int | None, int | None]:
    """For a transformer without a pipeline."""
    return None, None


class SchedulerSteps:
    """The step of a pipeline's loop that does not tell it (image-to-video, video-to-video), from its scheduler.

    Only the steps that run count: video-to-video leaves out the first ones. A timestep that is not the one at which the
    scheduler stands belongs to a loop with another scheduler, and its step is unknown.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._timesteps: Tensor | None = None
        self._values: list[float] = []
        self._begin: int | None = None

    def __call__(self, timestep: Tensor) -> tuple[int | None, int | None]:
        scheduler = self._pipeline.scheduler
        if getattr(scheduler, "timesteps", None) is None:
            return None, None
        if scheduler.timesteps is not self._timesteps:  # `set_timesteps` makes a new tensor, so a loop begins
            self._timesteps, self._begin = scheduler.timesteps, None
            self._values = [float(value) for value in scheduler.timesteps.tolist()]
        now = self._value(timestep, scheduler.timesteps)
        place = getattr(scheduler, "step_index", None)
        if place is None and now in self._values:
            place = self._values.index(now)
            if self._begin not in (None, place):  # the loop goes on, but this scheduler has made no step
                return None, None
        if place is None or place >= len(self._values) or self._values[place] != now:
            return None, None
        if self._begin is None or place < self._begin:
            self._begin = place
        return place - self._begin, len(self._values) - self._begin

    def _value(self, timestep: Tensor, timesteps: Tensor) -> float:
        storages = [x.untyped_storage().data_ptr() for x in (timestep, timesteps)]
        if timestep.stride() == (0,) and storages[0] == storages[1]:
            # An entry of the scheduler's, expanded over the batch: which one is known without waiting for the device.
            place, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), timesteps.stride(0))
            if rest == 0 and 0 <= place < len(self._values):
                return self._values[place]
        # Of all tokens' timesteps the largest: those of given frames are 0. It waits for the device, once a forward.
        return float(timestep.max())


class LoopPosition:
    """Guidance branch and step of the current forward of one transformer."""

    def __init__(self, fallback: StepSource) -> None:
        self.branch: str | None = None
        self._told: tuple[int | None, int | None] = (None, None)
        self._fallback = fallback

    def steps(self, timestep: Tensor) -> tuple[int | None, int | None]:
        return self._fallback(timestep) if None in self._told else self._told

    def listening(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def listening_context(name: str, **kwargs: Any) -> Iterator[None]:
            self.branch, self._told = name, (kwargs.get("step_index"), kwargs.get("num_inference_steps"))
            try:
                with cache_context(name, **kwargs):
                    yield
            finally:
                self.branch, self._told = None, (None, None)

        return listening_context
