"""Compare jobs: `compare.py [--tolerance X | --side-by-side VIDEO.mp4] reference.json other.json …`.

Reads the reports of `generate` with the latents and frames that they name (`--output-latents`, `--output-frames`), prints a
table, and exits with 1 if they differ by more than the tolerance. With --side-by-side nothing is judged: the first videos of
the jobs are put beside one another, from left to right, in one file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sp_sparse.generate.files import save_video

_GAP = 16  # white pixels between videos, of which codecs want multiples of 16
_COLUMNS = ("mesh", "ranks", "kernel", "density", "max |latents|", "max |frames|", "s/step")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a job differs from the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference")
    parser.add_argument("--side-by-side", type=Path, help=".mp4 to write the videos into, instead of comparing them")
    parser.add_argument("reports", nargs="+", type=Path)
    arguments = parser.parse_args(argv)
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.reports]
    if arguments.side_by_side is not None:
        _put_side_by_side(jobs, arguments.side_by_side)
        return 0
    differences = [_differences(job, jobs[0]) for job in jobs]
    _print_table([_row(job, *apart) for job, apart in zip(jobs, differences, strict=True)])
    far = [_mesh(job) for job, apart in zip(jobs, differences, strict=True) if max(apart) > arguments.tolerance]
    if far:
        print(f"error: {', '.join(far)} differ by more than {arguments.tolerance:g}", file=sys.stderr)
        return 1
    print(f"all equal to {_mesh(jobs[0])} within {arguments.tolerance:g}")
    return 0


def _put_side_by_side(jobs: Sequence[dict[str, Any]], path: Path) -> None:
    firsts = [job["videos"][0] for job in jobs]
    frames = [torch.load(video["output_frames"], weights_only=True) for video in firsts]
    gap = torch.ones_like(frames[0][:, :, :_GAP])
    row = [part for video in frames for part in (gap, video)][1:]
    save_video(torch.cat(row, 2), path, firsts[0]["made"]["fps"])


def _differences(job: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Largest absolute difference of latents and of frames, over the videos of the job."""
    latents, frames = (
        max(
            _largest_difference(one[name], other[name])
            for one, other in zip(job["videos"], reference["videos"], strict=True)
        )
        for name in ("output_latents", "output_frames")
    )
    return latents, frames


def _largest_difference(path: str, other: str) -> float:
    a, b = (torch.load(file, weights_only=True) for file in (path, other))
    difference: float = (a - b).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def _row(job: dict[str, Any], latents: float, frames: float) -> tuple[str, ...]:
    attention = job["attention"] or {"calls": {}, "mean_density": 1.0}
    kernels = [kernel for kernel in attention["calls"] if kernel != "dense"]
    return (
        _mesh(job),
        str(job["ranks"]),
        ", ".join(kernels) or "dense",
        f"{attention['mean_density']:.4f}",
        f"{latents:.1e}",
        f"{frames:.1e}",
        f"{job['seconds_per_step']:.3f}",
    )


def _mesh(job: dict[str, Any]) -> str:
    names = (("ulysses", "ulysses_degree"), ("ring", "ring_degree"), ("cfg", "cfg_degree"))
    used = [f"{name} {job['mesh'][degree]}" for name, degree in names if job["mesh"][degree] > 1]
    return " x ".join(used) or "1 rank"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (_COLUMNS, *rows)) for i in range(len(_COLUMNS))]
    for row in (_COLUMNS, tuple("-" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
