"""Whether a model follows captions that it was not trained on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.mini.check import judge
from launch.mini.samples import held_out_scenes, make_videos, save_strips
from launch.mini.sizes import Sizes

_STRIPS = 16


def examine(
    pipe: Any, sizes: Sizes, count: int, batch: int, steps: int, guidance: float, target: Path
) -> dict[str, Any]:
    """Make a video of each of `count` held-out captions and recognise its figures.

    Writes `check.json` (shares, settings, each caption's verdict) and `check.png` (the first videos) to `target`.
    """
    scenes = held_out_scenes(count)
    rows: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    start = time.perf_counter()
    for first in range(0, count, batch):
        part = scenes[first : first + batch]
        videos = make_videos(pipe, sizes, [caption for _, caption in part], steps, guidance)
        for (scene, caption), video in zip(part, videos, strict=True):
            verdict = judge(video, scene.figures)
            rows.append(
                {"caption": caption, "figures": len(scene.figures), "followed": verdict.followed, **asdict(verdict)}
            )
        if len(kept) * batch < _STRIPS:
            kept.append(videos.cpu())
        print(f"{len(rows)} of {count}: {_share(rows, 'followed'):.0%} followed", flush=True)
    found = {
        "captions": count,
        **{name: _share(rows, name) for name in ("followed", "color", "shape", "direction")},
        **{f"followed_{n}_figures": _share([r for r in rows if r["figures"] == n], "followed") for n in (1, 2)},
        "steps": steps,
        "guidance": guidance,
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "check.json").write_text(json.dumps({**found, "verdicts": rows}, indent=1) + "\n", encoding="utf-8")
    save_strips(torch.cat(kept)[:_STRIPS], target / "check.png")
    return found


def _share(rows: list[dict[str, Any]], name: str) -> float | None:
    return round(sum(row[name] for row in rows) / len(rows), 4) if rows else None
