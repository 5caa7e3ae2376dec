"""Whole jobs of `generate`, one after another: each loads, encodes, denoises, decodes and saves as a user's does."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from launch.benchmarks.results import Row, environment
from launch.benchmarks.wan import dense_backend
from sp_sparse.config import PRESETS
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.arguments import parse_arguments as parse_generate
from sp_sparse.generate.job import generate
from sp_sparse.generate.models import WanModel, load_pipeline, transformers_of
from sp_sparse.generate.ranks import USER_ERRORS, Ranks

KINDS = ("job", "memory")
PLAIN = "plain"

# A step that takes so many times the steps around it has compiled, or prepared the loop.
_SPIKE = 1.5
_AROUND = 2

_SMALL = (
    *("--model", "tiny", "--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"),
    *("--sparse-attn-backend", "reference"),
)


@dataclass(frozen=True)
class JobsArguments:
    """What to measure.

    Attributes:
        what: `job` or `memory`: what the rows are for.
        settings: flags of each job, as `setting_flags` reads them.
        common: flags of all jobs.
        folder: where videos and reports go.
        output: JSON lines are appended here.
        memory_gb: GB of each GPU that a job may take; None for all of it.
    """

    what: str
    settings: tuple[str, ...]
    common: tuple[str, ...]
    folder: Path
    output: Path | None
    memory_gb: float | None

    def jobs(self) -> list[GenerateArguments]:
        """The arguments of each setting.

        Raises:
            ValueError: flags that `generate` refuses, with the setting.
        """
        found = []
        for number, setting in enumerate(self.settings):
            places = ["--output", str(self.folder / f"{number}.mp4"), "--report", str(self.folder / f"{number}.json")]
            try:
                found.append(parse_generate([*self.common, *setting_flags(setting, self.common), *places]))
            except ValueError as error:
                raise ValueError(f"setting {setting!r}: {error}") from error
        return found


def parse_arguments(argv: Sequence[str], description: str | None) -> JobsArguments:
    """From the command line; what follows `--` are flags of `generate` for all jobs."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=KINDS, help="what the rows are called")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["dense", "0.7", "0.5", "0.3", *PRESETS],
        help=f"one job each, of words put together with +: dense, a density, a preset ({', '.join(PRESETS)}), {PLAIN} (no "
        "flag more), or a flag of generate without its dashes: 0.3+offload=idle+fsdp",
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/jobs"), help="for videos and reports")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    parser.add_argument("--memory-gb", type=float, help="GB of each GPU that a job may take, to try a smaller card")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try it on CPUs")
    given = parser.parse_args(argv[:split])
    return JobsArguments(
        what=given.what,
        settings=tuple(given.settings),
        common=(*(_SMALL if given.small else ()), *argv[split + 1 :]),
        folder=given.folder,
        output=given.output,
        memory_gb=given.memory_gb,
    )


def setting_flags(setting: str, common: Sequence[str] = ()) -> list[str]:
    """The flags of a setting: `0.3+offload=idle` -> `--sparse-attn-backend auto --sparse-attn-topk 0.3 --offload idle`.

    A backend among the flags of all jobs holds for densities too.
    """
    flags: list[str] = []
    for word in setting.split("+"):
        name, equals, value = word.partition("=")
        if word == "dense":
            flags += ["--sparse-attn-backend", "none"]
        elif word in PRESETS:
            flags += ["--sparse-attn-preset", word]
        elif _is_density(word):
            backend = [] if "--sparse-attn-backend" in common else ["--sparse-attn-backend", "auto"]
            flags += [*backend, "--sparse-attn-topk", word]
        elif word != PLAIN:
            flags += [f"--{name}", *([value] if equals else [])]
    return flags


def measure(arguments: JobsArguments, ranks: Ranks, load: Callable[..., Any] = load_pipeline) -> int:
    """Run the jobs, and write a row of each as soon as it is done. Every rank calls it.

    Returns:
        0; 1 if a job failed. On several ranks the jobs after that one are left out, since the ranks may be out of step.
    """
    jobs = arguments.jobs()
    if arguments.memory_gb is not None:
        _limit_memory(arguments.memory_gb, ranks.device)
    failed, dense_seconds = 0, None
    for number, (setting, job) in enumerate(zip(arguments.settings, jobs, strict=True)):
        ranks.say(f"{arguments.what} {setting}: {' '.join(setting_flags(setting, arguments.common))}")
        held = _forget(ranks.device)
        report: dict[str, Any] | None = None
        why: str | None = None
        try:
            generate(job, ranks, load=_with_fast_dense(load))
            report = _read(job.report_path(), ranks)
        except USER_ERRORS as error:
            failed, why = 1, " ".join(str(error).split())
        row = {
            **_asked(arguments, setting, job, ranks),
            "bytes_before": held,
            "bytes_used": max(ranks.gather(_used(ranks.device))) if why is None else None,
            **({"error": why} if report is None else _measured(report)),
        }
        if row.get("density_asked") == 1.0 and dense_seconds is None:
            dense_seconds = row.get("seconds_warm")
        row["speedup"] = dense_seconds / row["seconds_warm"] if dense_seconds and row.get("seconds_warm") else None
        _write(row | environment(ranks.device), arguments.output, ranks)
        if why is not None and ranks.world > 1:
            left = arguments.settings[number + 1 :]
            ranks.say(f"error: {why}{f'; not run: {chr(32).join(left)}' if left else ''}")
            break
    return failed


def compiling_seconds(steps: Sequence[float]) -> float:
    """What of the steps is not the steps': of each that takes 1.5 times the median of the five around it, the excess.

    Dense and sparse steps compile each at its first one, and the first of all prepares the loop too.
    """
    total = 0.0
    for place, seconds in enumerate(steps):
        # At the ends the window keeps its width, and it leaves out the step itself.
        start = max(0, min(place - _AROUND, len(steps) - 2 * _AROUND - 1))
        around = [other for at, other in enumerate(steps[start : start + 2 * _AROUND + 1], start) if at != place]
        if around and seconds > _SPIKE * median(around):
            total += seconds - median(around)
    return total


def _asked(arguments: JobsArguments, setting: str, job: GenerateArguments, ranks: Ranks) -> Row:
    return {
        "what": arguments.what,
        "setting": setting,
        "gpus": ranks.world,
        "ulysses": job.ulysses_degree,
        "ring": job.ring_degree,
        "cfg": job.cfg_parallel_degree,
        "model": job.model,
        "layers": job.layers,
        "full": job.full,
        "compiled": job.compile,
        "density_asked": 1.0 if job.sparse.backend == "none" else job.sparse.topk,
        "flags": [*arguments.common, *setting_flags(setting, arguments.common)],
        "memory_gb": arguments.memory_gb,
    }


def _measured(report: dict[str, Any]) -> Row:
    """Of a report what a row keeps."""
    steps = report["videos"][0]["step_seconds"][-1]
    made, attention = report["videos"][0]["made"], report["attention"]
    seconds, compiling = report["seconds"], compiling_seconds(steps)
    ((unit, peaks),) = report["peak_memory"].items()
    return {
        **{name: made[name] for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")},
        "scheduler": made["scheduler"],
        "density": None if attention is None else attention["mean_density"],
        "kernels": None if attention is None else attention["calls"],
        "latents_finite": report["videos"][0]["latents_finite"],
        "seconds_per_step": report["seconds_per_step"],
        "seconds": seconds,
        "seconds_compiling": compiling,
        # What a server that is warm takes for the video.
        "seconds_warm": sum(seconds[stage] for stage in ("encode", "denoise", "decode", "save")) - compiling,
        "step_seconds": steps,
        "peak_memory": peaks,
        "peak_memory_is": unit,
    }


def _with_fast_dense(load: Callable[..., Any]) -> Callable[..., Any]:
    """Dense attention, cross-attention too, by the backend that all benchmarks compare with."""

    def loaded(job: GenerateArguments, model: WanModel, device: torch.device) -> Any:
        pipe = load(job, model, device)
        for transformer in transformers_of(pipe):
            transformer.set_attention_backend(dense_backend(device))
        return pipe

    return loaded


def _forget(device: torch.device) -> int | None:
    """Free what the last job held; the bytes that are still held on a GPU."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _used(device: torch.device) -> int:
    """What the job took of the GPU in all: also the allocator's reserve, kernels and communication; 0 on CPUs."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _limit_memory(gigabytes: float, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError("--memory-gb limits a GPU, and the jobs run on CPUs; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gigabytes * 1e9 <= total:
        raise ValueError(f"--memory-gb {gigabytes:g} is not above 0 and up to the GPU's {total / 1e9:.1f}; give less")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)


def _read(path: Path, ranks: Ranks) -> dict[str, Any]:
    """The report that rank 0 wrote, on every rank."""
    report: dict[str, Any] = ranks.gather(json.loads(path.read_text(encoding="utf-8")) if ranks.first else {})[0]
    return report


def _write(row: Row, path: Path | None, ranks: Ranks) -> None:
    if not ranks.first:
        return
    text = json.dumps(row)
    print(text, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _is_density(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
