"""The stages of the training, in their order: vae, decoder, latents, text (in its own module), joint, high, low."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.mini import autoencoder
from launch.mini.captions import caption_of
from launch.mini.clips import render
from launch.mini.noise import noise_levels
from launch.mini.parts import (
    BOUNDARY,
    embed,
    make_tokenizer,
    make_transformer,
    make_vae,
    normalize,
    tokenize,
)
from launch.mini.scenes import Scene, sample_scene
from launch.mini.sizes import Sizes
from launch.mini.text import trained_text_encoder
from launch.mini.training import Budget, Log, Schedule, Stage, averaged
from sp_sparse.generate.ranks import Ranks

STAGES = ("vae", "decoder", "latents", "text", "joint", "high", "low")
EXPERTS = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}

_VAE_FRAMES = 17  # of a clip that the VAE is trained on at a time
_PHRASINGS = 4  # captions of each clip
_ENCODED = 32  # clips encoded at a time
_UNGUIDED = 0.1  # share of captions that are left out, for guidance


def training_scene(seed: str) -> Scene:
    """The same scene for the same seed, never one that is held out."""
    return sample_scene(random.Random(seed), held_out=False)


def train_vae(
    sizes: Sizes, folder: Path, ranks: Ranks, budget: Budget, batch: int, rate: float, start: Path | None = None
) -> float:
    """Train the VAE on windows of clips, `batch` a rank. Returns the mean absolute error of a pixel in -1 to 1."""
    torch.manual_seed(0)
    vae = make_vae(sizes) if start is None else component(start, "vae")
    device = ranks.device
    stage = Stage("vae", {"vae": vae.float().to(device)}, folder, Schedule(rate, decay=0.5), "clips", ranks)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        scenes = [training_scene(f"vae {step} {ranks.rank * batch + row}") for row in range(batch)]
        frames = min(_VAE_FRAMES, sizes.frames)
        first = random.Random(f"window {step}").randint(0, sizes.frames - frames)
        video = render(scenes, sizes.frames, sizes.side, device, slice(first, first + frames))
        with _half(device):
            return autoencoder.loss_of(vae, video, stage.generator)

    return stage.run(loss, budget)


def train_decoder(sizes: Sizes, folder: Path, ranks: Ranks, budget: Budget, batch: int, rate: float) -> float:
    """Train the decoder on over whole clips, `batch` a rank; what encodes stays as it is, and latents remain good.

    Windows do not show what causal layers pile up over a clip. Returns the mean absolute error of a pixel in -1 to 1.
    """
    device = ranks.device
    weights, step = averaged(folder / "vae.pt")
    vae = make_vae(sizes)
    vae.load_state_dict(weights["vae"])
    vae = vae.to(device)
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    stage = Stage("decoder", parts, folder, Schedule(rate, decay=0.7), f"VAE step {step}", ranks)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        scenes = [training_scene(f"decoder {step} {ranks.rank * batch + row}") for row in range(batch)]
        video = render(scenes, sizes.frames, sizes.side, device)
        with _half(device):
            with torch.no_grad():
                latents, _ = autoencoder.encode(vae, video)
            seen = autoencoder.decode(vae, latents)
        return autoencoder.difference_of(seen.float(), video)

    return stage.run(loss, budget)


@torch.no_grad()
def make_latents(sizes: Sizes, folder: Path, ranks: Ranks, budget: Budget, clips: int) -> int:
    """Encode clips, as many as asked for or as the budget allows, into `latents.pt`. Returns how many.

    Ranks take turns of `_ENCODED` clips; the first one gets all of them and writes.
    """
    device = ranks.device
    vae, step = trained_vae(sizes, folder, device)
    parts: list[Tensor] = []
    start = time.perf_counter()
    for _ in budget.steps_from(start, ranks):
        done = len(parts) * ranks.world * _ENCODED
        if done >= clips:
            break
        first = done + ranks.rank * _ENCODED
        scenes = [training_scene(f"clip {row}") for row in range(first, first + _ENCODED)]
        video = render(scenes, sizes.frames, sizes.side, device)
        with _half(device):
            parts.append(autoencoder.encode(vae, video)[0].half().cpu())
    if not parts:
        raise ValueError(f"no clip was encoded in {budget}; give this stage more --seconds")
    latents = _all_in_turns(torch.stack(parts), ranks)
    if not ranks.first:
        return len(latents)
    sample = latents[: 64 * _ENCODED].float()
    captions: list[str] = []
    for row in range(len(latents)):
        rng, scene = random.Random(f"caption {row}"), training_scene(f"clip {row}")
        captions += [caption_of(scene, rng) for _ in range(_PHRASINGS)]
    ids, mask = tokenize(make_tokenizer(), captions)
    width = int(mask.sum(1).max())
    torch.save(
        {
            "latents": latents,
            "ids": ids.view(len(latents), _PHRASINGS, -1)[..., :width].short(),
            "mask": mask.view(len(latents), _PHRASINGS, -1)[..., :width].bool(),
            "mean": sample.mean((0, 2, 3, 4)),
            "std": sample.std((0, 2, 3, 4)),
            "vae_step": step,
        },
        folder / "latents.pt",
    )
    Log(folder, ranks).write(stage="latents", clips=len(latents), seconds=time.perf_counter() - start, vae_step=step)
    return len(latents)


def _all_in_turns(parts: Tensor, ranks: Ranks) -> Tensor:
    """The first rank's `[turns, clips, …]` and those of the others, turn by turn: `[clips of all, …]`. Others: their own."""
    if ranks.world == 1:
        return parts.flatten(0, 1)
    everyone = [torch.empty_like(parts) for _ in range(ranks.world)] if ranks.first else None
    dist.gather(parts, everyone)
    return parts.flatten(0, 1) if everyone is None else torch.stack(everyone, 1).flatten(0, 2)


def trained_vae(sizes: Sizes, folder: Path, device: torch.device) -> tuple[Any, int]:
    """The VAE with its averaged weights, and, once there are latents, their statistics; and its step.

    Raises:
        ValueError: a decoder that belongs to another VAE.
    """
    weights, step = averaged(folder / "vae.pt")
    vae = make_vae(sizes)
    vae.load_state_dict(weights["vae"])
    if (file := folder / "decoder.pt").exists():
        parts, _ = averaged(file, of=f"VAE step {step}")
        for name, part in parts.items():
            getattr(vae, name).load_state_dict(part)
    if (folder / "latents.pt").exists():
        found = torch.load(folder / "latents.pt", map_location="cpu", weights_only=True, mmap=True)
        if found["vae_step"] == step:
            vae.register_to_config(latents_mean=found["mean"].tolist(), latents_std=found["std"].tolist())
    return vae.to(device).eval(), step


@torch.no_grad()
def reconstructions(sizes: Sizes, folder: Path, device: torch.device, count: int = 4) -> Tensor:
    """Held-out clips and what the VAE makes of each, in turn: [2 * count, T, 3, H, W] in 0 to 1."""
    vae, _ = trained_vae(sizes, folder, device)
    scenes = [sample_scene(random.Random(f"held out {row}"), held_out=True) for row in range(count)]
    video = render(scenes, sizes.frames, sizes.side, device)
    seen = autoencoder.decode(vae, autoencoder.encode(vae, video)[0]).clamp(-1, 1)
    Log(folder, Ranks(0, 1, device)).write(stage="vae", held_out_psnr=autoencoder.sharpness(video, seen).mean().item())
    return (torch.stack([video, seen], 1).flatten(0, 1).transpose(1, 2) + 1) / 2


class Latents:
    """Clips as normalised latents with their captions, on the device.

    Raises:
        FileNotFoundError: no latents yet.
        ValueError: latents of another VAE than the folder's.
    """

    def __init__(self, sizes: Sizes, folder: Path, device: torch.device) -> None:
        file = folder / "latents.pt"
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there; run --stage latents first")
        found = torch.load(file, map_location="cpu", weights_only=True)
        vae, step = trained_vae(sizes, folder, torch.device("cpu"))
        if found["vae_step"] != step:
            raise ValueError(
                f"{file} is of the VAE at step {found['vae_step']}, and vae.pt is at {step}; run --stage latents again"
            )
        self.of = f"latents of VAE step {step}"
        self._latents, self._vae = found["latents"].to(device), vae
        self._ids, self._mask = found["ids"].to(device), found["mask"].to(device)
        ids, mask = tokenize(make_tokenizer(), [""])
        width = self._ids.shape[-1]
        self._empty = ids[:, :width].to(device), mask[:, :width].bool().to(device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, C, T, H, W], token ids and their mask [B, L], one in ten the empty caption's."""
        device = self._latents.device
        row = torch.randint(len(self._latents), (size,), generator=generator, device=device)
        phrasing = torch.randint(_PHRASINGS, (size,), generator=generator, device=device)
        left_out = torch.rand((size, 1), generator=generator, device=device) < _UNGUIDED
        ids = torch.where(left_out, self._empty[0], self._ids[row, phrasing].long())
        mask = torch.where(left_out, self._empty[1], self._mask[row, phrasing])
        return normalize(self._vae, self._latents[row].float()), ids, mask.long()


def train_transformer(
    name: str,
    sizes: Sizes,
    folder: Path,
    ranks: Ranks,
    budget: Budget,
    batch: int,
    rate: float,
    start: Path | None = None,
) -> float:
    """Train by flow matching: `joint` a transformer for all noise, `high` or `low` an expert from it.

    `batch` clips a rank. Returns the mean squared error of the velocity.
    """
    device = ranks.device
    data = Latents(sizes, folder, device)
    text_encoder, text_step = trained_text_encoder(sizes, folder, device)
    torch.manual_seed(0)
    transformer = make_transformer(sizes)
    of = f"{data.of}, text step {text_step}"
    if name != "joint":
        weights, step = averaged(folder / "joint.pt", of=of)
        transformer.load_state_dict(weights["transformer"])
        of = f"{of}, joint step {step}"
    if start is not None:
        transformer = component(start, "transformer_2" if name == "low" else "transformer")
    transformer = transformer.float().to(device).train()
    schedule = Schedule(rate, decay=0.0 if name == "joint" else 1.0)
    stage = Stage(name, {"transformer": transformer}, folder, schedule, of, ranks)
    low, high = EXPERTS.get(name, (0.0, 1.0))

    def loss(step: int) -> tuple[Tensor, Tensor]:
        generator = stage.generator
        clean, ids, mask = data.batch(batch, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        level = noise_levels(batch, low, high, generator)
        share = level.view(-1, 1, 1, 1, 1)
        with _half(device):
            with torch.no_grad():
                text = embed(text_encoder, ids, mask)
            velocity = transformer((1 - share) * clean + share * noise, level * 1000, text, return_dict=False)[0]
        error = (velocity.float() - (noise - clean)).square().mean()
        return error, error

    if device.type == "cuda":
        _compile(transformer, lambda: loss(stage.step)[0], stage)
    return stage.run(loss, budget)


def _compile(transformer: Any, loss: Callable[[], Tensor], stage: Stage) -> None:
    """Compile the blocks; if that fails, say so and go on without."""
    before = stage.generator.get_state()
    start = time.perf_counter()
    try:
        transformer.compile_repeated_blocks()
        loss().backward()
        print(f"{stage.name}: blocks compiled in {time.perf_counter() - start:.0f} s", flush=True)
    except Exception as error:  # whatever the compiler of this machine does not manage
        print(f"{stage.name}: blocks are not compiled ({type(error).__name__}: {str(error)[:200]})", flush=True)
        torch._dynamo.reset()
        for block in transformer.blocks:
            block._compiled_call_impl = None
    stage.generator.set_state(before)


def _half(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def component(folder: Path, name: str) -> Any:
    """A trained part of an exported model, in float32."""
    import diffusers
    import transformers

    kind: Any = {"vae": diffusers.AutoencoderKLWan, "text_encoder": transformers.UMT5EncoderModel}.get(
        name, diffusers.WanTransformer3DModel
    )
    return kind.from_pretrained(folder, subfolder=name).float()
