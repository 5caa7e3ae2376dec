"""Rendering what is missing, and measuring each video against the model's own attention."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sp_sparse import AttentionRecorder, SequenceParallelMesh
from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.fidelity.metrics import CaptionCheck, VideoMetrics, check_caption
from sp_sparse.fidelity.observe import MaskObserver, assemble
from sp_sparse.fidelity.plan import Setting, labels
from sp_sparse.fidelity.progress import Progress
from sp_sparse.fidelity.render import Latents, Renderer, other_dense_kernel
from sp_sparse.fidelity.store import DENSE, FLOOR, SPARSE, Frames, Item, ResultStore
from sp_sparse.generate.attach import attach
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.report import versions
from sp_sparse.recent import Recent

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What is to be made and what of it is missing, as rank 0 found it.

    Attributes:
        prompts: their texts.
        missing: videos.
        looks: settings whose masks are still to be looked at, for the first prompt.
        total: videos and looks, those included that are there.
    """

    prompts: tuple[str, ...]
    missing: frozenset[Item]
    looks: tuple[Setting, ...]
    total: int


@dataclass(frozen=True)
class _Made:
    """A video before it is compared; `told` goes into its line."""

    item: Item
    frames: Frames
    told: dict[str, Any]


class Measurement:
    """The loop over videos. Rank 0 alone compares and writes; all ranks make each sparse video together."""

    def __init__(
        self,
        arguments: FidelityArguments,
        ranks: Ranks,
        store: ResultStore,
        renderer: Renderer,
        mesh: SequenceParallelMesh,
        progress: Progress,
        caption_check: CaptionCheck | None,
    ) -> None:
        self._arguments, self._ranks, self._store, self._renderer = arguments, ranks, store, renderer
        self._mesh, self._progress, self._caption_check = mesh, progress, caption_check
        sides = renderer.arguments.height, renderer.arguments.width
        self._metrics = VideoMetrics(ranks.device, min(side for side in sides if side)) if ranks.first else None
        # Of the dense videos that a round over the ranks makes, which are the next ones to be compared with.
        self._references: Recent[Item, Frames] = Recent(ranks.world * arguments.batch)
        self._shown: tuple[str, ...] = ()
        self._labels = labels(arguments.settings)
        if self._metrics is not None and self._metrics.without_lpips is not None:
            ranks.say(f"LPIPS is left out: {self._metrics.without_lpips}")

    def run(self, work: Work) -> None:
        """Make what is missing. Prompt by prompt, so that what is there at any time can be compared in pairs.

        A batch with a missing video is made whole: a batch of another size would round otherwise.
        """
        self._shown = work.prompts[: self._arguments.shown]
        videos = [(prompt, seed) for prompt in work.prompts for seed in range(self._arguments.seeds)]
        batches = _cut(videos, self._arguments.batch)
        for round_of_ranks in _cut(batches, self._ranks.world):
            for kind in (DENSE, FLOOR):
                items = [[Item(kind, *video) for video in batch] for batch in round_of_ranks]
                self._make_alone([batch for batch in items if not work.missing.isdisjoint(batch)], work.missing)
            for batch in round_of_ranks:
                for setting in self._arguments.settings:
                    together = [Item(SPARSE, *video, setting) for video in batch]
                    if not work.missing.isdisjoint(together):
                        self._make_together(together, setting, work.missing)
        for setting in work.looks:
            self._look(setting, work.prompts[0])

    def _make_alone(self, batches: Sequence[Sequence[Item]], missing: Collection[Item]) -> None:
        """The model's own attention knows no mesh: each rank makes another batch, as long as there are some."""
        if not batches:
            return
        ranks = self._ranks
        # A rank too many makes one again: it would give up waiting for a long one.
        made = ranks.together(lambda: self._render_alone(batches[ranks.rank % len(batches)]))
        every = self._to_first(made if ranks.rank < len(batches) else [])
        ranks.together(lambda: self._record(every, missing))

    def _render_alone(self, items: Sequence[Item]) -> list[_Made]:
        with other_dense_kernel(self._renderer.pipe) if items[0].kind == FLOOR else nullcontext():
            result = self._renderer.denoise([(item.prompt, item.seed) for item in items])
        told = {
            "density": 1.0,
            "density_all": 1.0,
            "calls": {},
            "kv_exchange": [],
            "mesh": _mesh_told(SequenceParallelMesh()),
        }
        return self._decoded(items, result, told)

    def _decoded(self, items: Sequence[Item], result: Latents, told: dict[str, Any]) -> list[_Made]:
        start = time.perf_counter()
        every = self._renderer.decode(result)
        seconds = {"seconds": result.seconds, "decode_seconds": time.perf_counter() - start}
        told = {**told, **{name: value / len(items) for name, value in seconds.items()}, "batch": len(items)}
        return [
            _Made(item, frames, {**told, "finite": finite})
            for item, frames, finite in zip(items, every, result.finite, strict=True)
        ]

    def _to_first(self, made: list[_Made]) -> list[_Made]:
        """What every rank made, on rank 0; nothing on the others."""
        if self._ranks.world == 1:
            return made
        every: list[list[_Made]] = [[]] * self._ranks.world
        dist.gather_object(made, every if self._ranks.first else None)
        return [one for of_rank in every for one in of_rank]

    def _make_together(self, items: Sequence[Item], setting: Setting, missing: Collection[Item]) -> None:
        ranks, recorder = self._ranks, AttentionRecorder()
        config = self._arguments.config(setting)
        with ranks.together(lambda: attach(self._renderer.pipe, config, self._mesh, recorder)):
            result = self._renderer.denoise([(item.prompt, item.seed) for item in items])
        summary = recorder.summary(self._mesh.groups)
        told = {
            **_densities(summary["densities"]),
            "calls": summary["calls"],
            "kv_exchange": summary["kv_exchange"],
            "mesh": _mesh_told(self._mesh),
        }
        ranks.together(lambda: self._record(self._decoded(items, result, told), missing) if ranks.first else None)

    def _record(self, every: Iterable[_Made], missing: Collection[Item]) -> None:
        """Compare and write, on rank 0."""
        for made in every:
            item, setting = made.item, made.item.setting
            if item not in missing:  # made for the sake of its batch
                continue
            if item.kind == DENSE or (item.prompt in self._shown and item.seed == 0):
                self._store.keep_frames(item, made.frames)
            line = {
                "kind": item.kind,
                "prompt": item.prompt,
                "seed": item.seed,
                "setting": None if setting is None else setting.to_json(),
                **self._measured(made),
                "caption": check_caption(self._caption_check, made.frames, item.prompt, self._ranks.device),
                **made.told,
                "model": self._arguments.model,
                "device": _device_told(self._ranks.device),
                "versions": versions("diffusers", "transformers", "triton", "torchmetrics"),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            self._store.append(line)
            self._tell(line, setting)

    def _measured(self, made: _Made) -> dict[str, float | None]:
        item = made.item
        if item.kind == DENSE:
            self._references.get(item, lambda: made.frames)
            return {"psnr": None, "ssim": None, "lpips": None}
        assert self._metrics is not None
        dense = Item(DENSE, item.prompt, item.seed)
        return self._metrics.compare(made.frames, self._references.get(dense, lambda: self._kept(dense)))

    def _kept(self, dense: Item) -> Frames:
        frames = self._store.frames(dense)
        if frames is None:
            raise RuntimeError(
                f"the dense frames of {dense.prompt!r} are gone from {self._store.folder}; start the same command again"
            )
        return frames

    def _look(self, setting: Setting, prompt: str) -> None:
        """Make the video of `prompt` at seed 0 again, and look at its masks meanwhile."""
        renderer, ranks = self._renderer, self._ranks
        steps = renderer.arguments.num_inference_steps
        assert steps is not None  # filled
        observer = MaskObserver(renderer.layers, setting.dense_steps, steps)
        config = self._arguments.config(setting)
        with ranks.together(lambda: attach(renderer.pipe, config, self._mesh, observer)) as handle:
            observer.watch(handle.layers)
            renderer.denoise([(prompt, 0)])
        # The ranks of the first guidance half, which has the caption.
        parts = ranks.gather(observer.seen)[: self._mesh.sequence_degree]

        def keep() -> None:
            self._store.keep_masks(setting, prompt, assemble(parts, renderer.heads))

        ranks.together(lambda: keep() if ranks.first else None)
        self._progress.step(f"masks of {self._labels[setting]}")

    def _tell(self, line: dict[str, Any], setting: Setting | None) -> None:
        what = {DENSE: "dense", FLOOR: "dense by another kernel"}.get(
            line["kind"], "" if setting is None else self._labels[setting]
        )
        figures = f", {_quality(line)}" if line["kind"] != DENSE else ""
        self._progress.step(f"{what}: {line['prompt'][:40]!r} seed {line['seed']}{figures}, {line['seconds']:.1f} s")
        if not line["finite"]:
            self._ranks.say(f"warning: the latents of {what} are not finite; try --dtype float32")


def _cut(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[first : first + size] for first in range(0, len(values), size)]


def _quality(line: dict[str, Any]) -> str:
    psnr = "identical" if line["psnr"] is None else f"PSNR {line['psnr']:.2f} dB"
    return f"{psnr}, SSIM {line['ssim']:.3f}"


def _densities(places: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`density` over the sparse calls, 1 where there are none; `density_all` over all of them."""
    sparse = [place["density"] for place in places if not place["dense_calls"]]
    return {
        "density": sum(sparse) / len(sparse) if sparse else 1.0,
        "density_all": sum(place["density"] for place in places) / len(places),
    }


def _mesh_told(mesh: SequenceParallelMesh) -> dict[str, int]:
    return {"ulysses": mesh.ulysses_degree, "ring": mesh.ring_degree, "cfg": mesh.cfg_degree}


def _device_told(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
