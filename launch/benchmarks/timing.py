"""Milliseconds of a call, on every rank at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sp_sparse.generate.ranks import Ranks

# About 2 ms: the host gets so far ahead of the GPU, as it is amid a model, so that launching is not what is timed.
_HEAD_START_CYCLES = 4_000_000


@dataclass(frozen=True)
class Times:
    """Milliseconds of the timed calls, each the slowest rank's.

    Attributes:
        median, least, most: of the calls.
        peak_memory: largest number of bytes allocated on a GPU during them, whatever else it holds included; None on CPUs.
    """

    median: float
    least: float
    most: float
    peak_memory: int | None


@dataclass(frozen=True)
class Timer:
    """Times calls: CUDA events on GPUs, the clock on CPUs; the ranks start each call together.

    Attributes:
        ranks: all of them time at once; the slowest one counts.
        warmup: calls before, which also compile.
        repeat: timed calls.
    """

    ranks: Ranks
    warmup: int
    repeat: int

    def __call__(self, call: Callable[[int], object]) -> Times:
        """Time `call`, which is given the number of the call, to rotate its inputs by. A collective call."""
        for number in range(self.warmup):
            call(number)
        device = self.ranks.device
        peak = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        mine = [self._milliseconds(call, self.warmup + number) for number in range(self.repeat)]
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        every = self.ranks.gather((mine, peak))
        slowest = [max(of_ranks) for of_ranks in zip(*(times for times, _ in every), strict=True)]
        peaks = [bytes_ for _, bytes_ in every if bytes_ is not None]
        return Times(statistics.median(slowest), min(slowest), max(slowest), max(peaks, default=None))

    def _milliseconds(self, call: Callable[[int], object], number: int) -> float:
        if self.ranks.device.type != "cuda":
            _meet(self.ranks)
            start = time.perf_counter()
            call(number)
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        line_up(self.ranks)
        begin.record()
        call(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def line_up(ranks: Ranks) -> None:
    """Let the GPUs start what is queued next together, with their hosts ahead of them. A collective call."""
    torch.cuda.synchronize(ranks.device)
    _meet(ranks)
    token = torch.zeros(1, device=ranks.device)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    if ranks.world > 1:
        dist.all_reduce(token)  # on the GPUs, whose clocks differ, so that they have not spun equally long


def _meet(ranks: Ranks) -> None:
    if ranks.world > 1:
        dist.barrier()
