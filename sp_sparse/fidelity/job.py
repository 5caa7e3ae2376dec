"""One measurement: check, see what is missing, render and compare it, write the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.fidelity.measurement import Measurement, Work
from sp_sparse.fidelity.metrics import CaptionCheck, load_caption_check
from sp_sparse.fidelity.progress import Progress
from sp_sparse.fidelity.render import Renderer
from sp_sparse.fidelity.report import report_files
from sp_sparse.fidelity.store import DENSE, FLOOR, SPARSE, Item, ResultStore
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.attach import build_mesh, check_names
from sp_sparse.generate.auto_mesh import with_mesh
from sp_sparse.generate.checks import checked_model, checked_video
from sp_sparse.generate.models import WanModel, load_pipeline
from sp_sparse.generate.prompts import wanted_videos
from sp_sparse.generate.ranks import Ranks

T = TypeVar("T")

# What all videos of a folder share: with another value of one of these they cannot be compared.
_SHARED = (
    *("model", "layers", "lora", "lora_2", "negative_prompt", "image", "height", "width", "num_frames", "fps"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2", "scheduler", "flow_shift"),
)
# Likewise, but kept only where they are given: folders that know nothing of these flags are gone on with.
_SHARED_IF_GIVEN = ("full", "lora_scale", "lora_scale_2", "boundary_ratio", "vae_tiling", "last_image")


def measure(arguments: FidelityArguments, ranks: Ranks) -> int:
    """Run the job; every rank calls it with the same arguments.

    Returns:
        0.
    """
    ranks.check_same(arguments)
    store = ResultStore(arguments.folder)
    if arguments.report_only:
        prompts = _prompts(arguments.base())
        on_first(ranks, lambda: _report(arguments, store, prompts))
        return 0
    base, model, caption_check = ranks.together(lambda: _check(arguments, ranks))
    work = on_first(ranks, lambda: _open(arguments, base, model, store, ranks))
    if work.missing or work.looks:
        pipe = ranks.together(lambda: load_pipeline(base, model, ranks.device))
        renderer = Renderer.of(pipe, base, ranks.device, work.prompts, model)
        mesh = ranks.together(lambda: build_mesh(base))
        progress = Progress(ranks, work.total, work.total - len(work.missing) - len(work.looks))
        measurement = ranks.together(
            lambda: Measurement(arguments, ranks, store, renderer, mesh, progress, caption_check)
        )
        measurement.run(work)
    on_first(ranks, lambda: _report(arguments, store, work.prompts))
    return 0


def _report(arguments: FidelityArguments, store: ResultStore, prompts: tuple[str, ...]) -> None:
    if not store.lines():
        raise ValueError(
            f"--output {arguments.folder} has no measured video to report; measure some, without --report-only"
        )
    store.write(report_files(store, arguments, prompts))
    print(f"report: {arguments.folder / 'index.html'}", file=sys.stderr, flush=True)


def _prompts(base: GenerateArguments) -> tuple[str, ...]:
    found = (video.arguments.prompt for video in wanted_videos(base, "--prompts"))
    return tuple(dict.fromkeys(prompt for prompt in found if prompt is not None))  # a line always has one


def on_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank; if it fails there, all fail. A collective call."""
    found = ranks.gather(ranks.together(lambda: action() if ranks.first else None))[0]
    return found  # type: ignore[return-value]  # None on the other ranks alone


def _check(arguments: FidelityArguments, ranks: Ranks) -> tuple[GenerateArguments, WanModel, CaptionCheck | None]:
    """Refuse what can be refused before weights are read; the arguments with the model's own values for what is open."""
    base = with_mesh(arguments.base(), ranks)
    for setting in arguments.settings:
        check_names(arguments.config(setting), base.ring_degree)
    caption_check = None if arguments.caption_check is None else load_caption_check(arguments.caption_check)
    model = checked_model(base, ranks)
    base = checked_video(base, model)
    steps = base.num_inference_steps
    assert steps is not None  # filled
    if max(arguments.dense_steps) >= steps:
        raise ValueError(f"--dense-steps {max(arguments.dense_steps)} leaves none of {steps} steps sparse; use fewer")
    return base, model, caption_check


def _open(
    arguments: FidelityArguments, base: GenerateArguments, model: WanModel, store: ResultStore, ranks: Ranks
) -> Work:
    """Begin or go on with the folder, and see what is missing."""
    # A batch of another size rounds otherwise, by which long trajectories part.
    store.open({**_shared_by_all(base, model, ranks), "batch": arguments.batch})
    prompts = _prompts(base)
    kinds = (DENSE, FLOOR) if arguments.noise_floor else (DENSE,)
    settings = arguments.settings
    items = [
        item
        for prompt in prompts
        for seed in range(arguments.seeds)
        for item in (
            *(Item(kind, prompt, seed) for kind in kinds),
            *(Item(SPARSE, prompt, seed, setting) for setting in settings),
        )
    ]
    looks = [
        setting for setting in settings if arguments.masks and setting.density < 1.0 and _leads(setting, arguments)
    ]
    missing = frozenset(items) - store.done()
    return Work(
        prompts=prompts,
        missing=missing,
        looks=tuple(setting for setting in looks if store.masks(setting, prompts[0]) is None),
        total=len(items) + len(looks),
    )


def _leads(setting: Any, arguments: FidelityArguments) -> bool:
    """Whether the masks of a setting are looked at: those that differ in nothing that chooses blocks are looked at once."""
    return bool(setting.remainder == arguments.remainders[0] and setting.dense_steps == arguments.dense_steps[0])


def _shared_by_all(base: GenerateArguments, model: WanModel, ranks: Ranks) -> dict[str, Any]:
    values = asdict(base)
    dtype = str(model.dtype).removeprefix("torch.") if base.dtype == "auto" else base.dtype
    names = (*_SHARED, *(name for name in _SHARED_IF_GIVEN if values[name]))
    shared = {name: values[name] for name in names} | {"dtype": dtype, "device": ranks.device.type}
    if base.quantization != "none":
        shared["quantization"] = base.quantization
    read_back: dict[str, Any] = json.loads(json.dumps(shared))
    return read_back
