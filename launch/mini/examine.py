"""Whether a model follows captions that it was not trained on."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.mini import autoencoder
from launch.mini.captions import caption_of
from launch.mini.check import judge
from launch.mini.clips import render
from launch.mini.parts import BOUNDARY, embed, normalize, tokenize
from launch.mini.samples import held_out_scenes, make_videos, save_strips
from launch.mini.scenes import Scene
from launch.mini.sizes import Sizes

_STRIPS = 16
_LEVELS = (0.97, 0.92, 0.88, 0.8, 0.7, 0.5)  # of noise


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


@torch.no_grad()
def exchange(pipe: Any, sizes: Sizes, count: int) -> list[dict[str, float]]:
    """What it costs to be told the wrong words of the two, by noise level.

    `right` is the squared error of the velocity for right captions of `count` held-out clips with two figures; `shape`,
    `direction` and `color` are how much larger it is with those exchanged in the caption. For a model that draws from a
    bag of words it is no larger; that it reads which words belong together shows here long before videos follow captions.
    """
    device = pipe.device
    scenes = [scene for scene, _ in held_out_scenes(20 * count) if _unlike(scene)][:count]
    video = render(scenes, sizes.frames, sizes.side, device)
    clean = normalize(pipe.vae, torch.cat([autoencoder.encode(pipe.vae, clip)[0] for clip in video.split(1)]))
    noise = torch.randn(clean.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    texts = {}
    for what in ("right", "shape", "direction", "color"):
        captions = [caption_of(_exchanged(scene, what), random.Random(row)) for row, scene in enumerate(scenes)]
        ids, mask = tokenize(pipe.tokenizer, captions)
        texts[what] = embed(pipe.text_encoder, ids.to(device), mask.to(device))
    rows = []
    for level in _LEVELS:
        expert = pipe.transformer if level >= BOUNDARY else pipe.transformer_2
        noised, time = (1 - level) * clean + level * noise, torch.full((len(scenes),), level * 1000, device=device)
        errors = {
            what: (expert(noised, time, text, return_dict=False)[0] - (noise - clean)).square().mean().item()
            for what, text in texts.items()
        }
        rows.append({"level": level, **{w: e - errors["right"] if w != "right" else e for w, e in errors.items()}})
    return rows


def _unlike(scene: Scene) -> bool:
    """Whether it has two figures that differ in shape and in direction."""
    if len(scene.figures) == 1:
        return False
    one, other = scene.figures
    return one.shape != other.shape and one.direction != other.direction


def _exchanged(scene: Scene, what: str) -> Scene:
    if what == "right":
        return scene
    one, other = scene.figures
    return replace(
        scene, figures=(replace(one, **{what: getattr(other, what)}), replace(other, **{what: getattr(one, what)}))
    )


def _share(rows: list[dict[str, Any]], name: str) -> float | None:
    return round(sum(row[name] for row in rows) / len(rows), 4) if rows else None
