"""What a GPU did and when, read from a torch profiler's trace, and how much of it was hidden behind attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# A kernel belongs to the first part whose pattern is found in its name; what is left are copies and the like.
_PATTERNS = (
    ("exchange", "nccl"),
    ("merge", "merge"),
    ("selection", "mean_blocks|score_tiles|select_row|split"),
    ("attention", "flash|attend|fmha|sdpa|prefill"),
)
PARTS = (*(part for part, _ in _PATTERNS), "copies")

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LONGEST_NAME = 60

# The kernel of torch.cuda._sleep.
BEGIN_MARK = "spin_kernel"


@dataclass(frozen=True)
class GpuWork:
    """One kernel or copy.

    Attributes:
        rank: whose GPU it ran on.
        stream: number of the CUDA stream.
        part: one of `PARTS`.
        name: of the kernel, cut short.
        start, end: milliseconds since the call began on that GPU.
    """

    rank: int
    stream: int
    part: str
    name: str
    start: float
    end: float


def read_trace(events: Iterable[dict[str, Any]], rank: int) -> list[GpuWork]:
    """The GPU's work after the last `BEGIN_MARK`, in order of time.

    Args:
        events: `traceEvents` of a chrome trace, in microseconds.

    Raises:
        ValueError: the trace holds no such mark, and so no GPU work.
    """
    done = sorted((e for e in events if e.get("cat") in _GPU_WORK), key=lambda e: (e["ts"], e["args"]["stream"]))
    marks = [place for place, event in enumerate(done) if BEGIN_MARK in event["name"]]
    if not marks:
        raise ValueError("the profiler saw no GPU work; is CUPTI available to it?")
    begin = done[marks[-1]]["ts"] + done[marks[-1]]["dur"]
    works = []
    for event in done[marks[-1] + 1 :]:
        name, start = event["name"], (event["ts"] - begin) / 1e3
        part = next((part for part, pattern in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), PARTS[-1])
        end = start + event["dur"] / 1e3
        works.append(GpuWork(rank, event["args"]["stream"], part, name[:_LONGEST_NAME], round(start, 4), round(end, 4)))
    return works


def digest(works: Sequence[GpuWork]) -> dict[str, float]:
    """Milliseconds of the parts on the rank where each took longest, and of exchanges that no attention hid."""
    of_rank: dict[int, list[GpuWork]] = {}
    for work in works:
        of_rank.setdefault(work.rank, []).append(work)
    told = {f"ms_{part}": max(_covered(w for w in ws if w.part == part) for ws in of_rank.values()) for part in PARTS}
    told["ms_exposed"] = max(_exposed(ws) for ws in of_rank.values())
    told["ms_idle"] = max(max(w.end for w in ws) - _covered(ws) for ws in of_rank.values())
    return {name: round(value, 4) for name, value in told.items()}


def _exposed(works: Sequence[GpuWork]) -> float:
    attention = [w for w in works if w.part == "attention"]
    return _covered([w for w in works if w.part in ("attention", "exchange")]) - _covered(attention)


def _covered(works: Iterable[GpuWork]) -> float:
    """Milliseconds in which at least one of the works ran."""
    total, until = 0.0, 0.0
    for work in sorted(works, key=lambda w: w.start):
        total += max(0.0, work.end - max(until, work.start))
        until = max(until, work.end)
    return total
