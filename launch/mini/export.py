"""Puts trained parts together as a diffusers pipeline, and writes it as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from launch.mini.parts import BOUNDARY, make_scheduler, make_tokenizer, make_transformer
from launch.mini.sizes import Sizes
from launch.mini.stages import trained_vae
from launch.mini.text import trained_text_encoder
from launch.mini.training import averaged

MOST_BYTES = 30_000_000
_CARD = Path(__file__).with_name("card.md")


def assemble(sizes: Sizes, folder: Path, device: torch.device) -> Any:
    """The pipeline of a folder of checkpoints, in float32; an expert that has none is the joint transformer.

    Raises:
        FileNotFoundError: with the stage that has to be run first.
    """
    from diffusers import WanPipeline

    vae, _ = trained_vae(sizes, folder, device)
    joint, _ = averaged(folder / "joint.pt", device)
    text_encoder, _ = trained_text_encoder(sizes, folder, device)
    experts = []
    for name in ("high", "low"):
        file = folder / f"{name}.pt"
        weights = averaged(file, device)[0] if file.exists() else joint
        expert = make_transformer(sizes)
        expert.load_state_dict(weights["transformer"])
        experts.append(expert.to(device).eval())
    pipe: Any = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=make_scheduler(),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=BOUNDARY,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(sizes: Sizes, folder: Path, target: Path) -> int:
    """Write the model to `target`, in float16, with its card and log; return the bytes of all files.

    Raises:
        ValueError: weights that are not finite, or a model larger than the repository takes.
    """
    pipe = assemble(sizes, folder, torch.device("cpu"))
    for name in ("text_encoder", "vae", "transformer", "transformer_2"):
        part = getattr(pipe, name).half()
        worst = [key for key, value in part.state_dict().items() if not value.isfinite().all()]
        if worst:
            raise ValueError(f"{worst[0]} of {name} is not finite in float16; train again from an earlier checkpoint")
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target)
    shutil.copy(_CARD, target / "README.md")
    shutil.copy(folder / "log.jsonl", target / "log.jsonl")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{target} has {size:,} bytes, and the repository takes {MOST_BYTES:,}; choose smaller Sizes")
    return size
