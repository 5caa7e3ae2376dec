"""Makes videos from captions and lays them out as pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.mini.captions import caption_of
from launch.mini.scenes import Scene, sample_scene
from launch.mini.sizes import Sizes

STEPS = 12
GUIDANCE = 3.0
_COLUMNS = 7


def held_out_scenes(count: int) -> list[tuple[Scene, str]]:
    """Scenes that no training clip shows, with their captions; always the same ones."""
    found = []
    for number in range(count):
        rng = random.Random(f"held out {number}")
        scene = sample_scene(rng, held_out=True)
        found.append((scene, caption_of(scene, rng)))
    return found


@torch.no_grad()
def make_videos(
    pipe: Any, sizes: Sizes, captions: Sequence[str], steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0
) -> Tensor:
    """Videos [B, T, 3, H, W] in 0 to 1; the noise of each depends on `seed` and its own caption alone."""
    generators = [torch.Generator().manual_seed(random.Random(f"{seed} {text}").getrandbits(63)) for text in captions]
    video: Tensor = pipe(
        prompt=list(captions),
        height=sizes.side,
        width=sizes.side,
        num_frames=sizes.frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
    ).frames
    return video.float()


def save_strips(videos: Tensor, file: Path) -> None:
    """One row a video [B, T, 3, H, W] in 0 to 1, some of its frames from left to right, as a PNG."""
    from PIL import Image

    frames = torch.linspace(0, videos.shape[1] - 1, min(_COLUMNS, videos.shape[1])).round().long()
    picked = videos[:, frames.to(videos.device)]
    rows, columns, _, height, width = picked.shape
    pixels = (picked.clamp(0, 1) * 255).byte().permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.cpu().numpy()).save(file)
