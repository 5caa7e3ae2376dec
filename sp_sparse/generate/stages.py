"""Seconds and peak memory of the stages of a job."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sp_sparse.generate.ranks import Ranks


class Stages:
    """Measures stages; one that is entered again adds to its seconds."""

    def __init__(self, ranks: Ranks) -> None:
        self.seconds: dict[str, float] = {}
        self._peaks: dict[str, dict[str, int]] = {}
        self._ranks = ranks

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        device = self._ranks.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for kind, peak in _peaks(device).items():
            before = self._peaks.setdefault(kind, {})
            before[name] = max(before.get(name, 0), peak)
        self._ranks.say(f"{name}: {seconds:.2f} s")

    def peak_memory(self) -> dict[str, Any]:
        """Peak bytes of each stage, the highest over the ranks. A collective call.

        On GPUs `cuda_bytes` are those of tensors, `cuda_reserved_bytes` what torch has taken from the GPU for them, which
        has to fit; on CPUs `process_bytes` is the process's peak up to the stage's end.
        """
        every = self._ranks.gather(self._peaks)
        return {
            kind: {name: max(peaks[kind].get(name, 0) for peaks in every) for name in of_stages}
            for kind, of_stages in self._peaks.items()
        }


class StepClock:
    """Seconds of each denoising step: a `callback_on_step_end`. The first includes the preparation before the loop."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._last = time.perf_counter()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return {}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peaks(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {"cuda_bytes": peak_bytes(device), "cuda_reserved_bytes": torch.cuda.max_memory_reserved(device)}
    return {"process_bytes": peak_bytes(device)}


def peak_bytes(device: torch.device) -> int:
    """Most bytes since the peak was last reset; on CPUs, of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
