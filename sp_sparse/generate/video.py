"""From prompts to videos, in the steps that a pipeline does at once: encode, denoise, decode, save."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.decode import VideoDecoding
from sp_sparse.generate.files import numbered, save_tensor, save_video
from sp_sparse.generate.lora import lora_told, use_lora
from sp_sparse.generate.memory import DECODE, DENOISE, ENCODE, says_what_helps
from sp_sparse.generate.models import shift_of
from sp_sparse.generate.offload import send_home
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.stages import Stages, StepClock
from sp_sparse.generate.start import Start

_TEXT_LENGTH = 512


@dataclass(frozen=True)
class EncodedPrompt:
    """What the transformer reads of a prompt: `[1, L, C]`, the negative one None without guidance. Several prompts that are
    denoised together are one of `[B, L, C]`."""

    text: str
    embeds: Tensor
    negative: Tensor | None


def encode_prompts(pipe: Any, videos: Sequence[GenerateArguments], device: torch.device) -> list[EncodedPrompt]:
    """Encode all prompts, then drop the text encoder: its memory is worth more to attention."""
    texts = [(_prompt_of(video), video.negative_prompt) for video in videos]
    encoded = {text: encode_prompt(pipe, videos[texts.index(text)], text[0], device) for text in dict.fromkeys(texts)}
    drop_text_encoder(pipe)
    return [encoded[text] for text in texts]


def _prompt_of(video: GenerateArguments) -> str:
    assert video.prompt is not None  # filled
    return video.prompt


def drop_text_encoder(pipe: Any) -> None:
    """Let go of its memory, on the device and the CPU; prompts encoded from here on are random."""
    send_home(pipe)
    pipe.text_encoder = None


@torch.no_grad()
def encode_prompt(pipe: Any, arguments: GenerateArguments, text: str, device: torch.device) -> EncodedPrompt:
    """Encode one prompt; a model without a text encoder gets random numbers."""
    guided = arguments.guidance_scale is None or arguments.guidance_scale > 1
    if pipe.text_encoder is None:
        return _random_prompt(pipe, text, guided, device)
    with says_what_helps(arguments.memory, ENCODE):
        embeds, negative = pipe.encode_prompt(
            text, arguments.negative_prompt, guided, max_sequence_length=_TEXT_LENGTH, device=device
        )
    return EncodedPrompt(text, embeds, negative)


def denoise(
    pipe: Any,
    arguments: GenerateArguments,
    prompt: EncodedPrompt,
    clock: StepClock,
    start: Start,
    seeds: Sequence[int] = (),
) -> Tensor:
    """The final latents `[B, C, T, H, W]`, from the noise of `seeds`, one a prompt; by default that of the arguments."""
    inputs = start.inputs(arguments)
    # A pipeline without a second expert refuses its guidance scale.
    if arguments.guidance_scale_2 is not None:
        inputs["guidance_scale_2"] = arguments.guidance_scale_2
    # On the CPU: the same noise on every rank and device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or (arguments.seed,)]
    generator = generators[0] if len(generators) == 1 else generators
    with says_what_helps(arguments.memory, DENOISE), _turns(pipe), seeded_steps(pipe.scheduler, generator):
        latents: Tensor = pipe(
            prompt_embeds=prompt.embeds,
            negative_prompt_embeds=prompt.negative,
            height=arguments.height,
            width=arguments.width,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            generator=generator,
            output_type="latent",
            callback_on_step_end=clock,
            **inputs,
        ).frames
    return latents[:, :, len(start.references) :]  # VACE gives its reference images first


@contextmanager
def _turns(pipe: Any) -> Iterator[None]:
    """What takes turns on the device is off it before and, whatever happens, after: a VAE may need the room."""
    send_home(pipe)
    try:
        yield
    finally:
        send_home(pipe)


@contextmanager
def seeded_steps(scheduler: Any, generator: torch.Generator | list[torch.Generator]) -> Iterator[None]:
    """Within it, the noise that a scheduler draws in its steps comes from `generator`, or one a video; Wan's pipelines pass
    none."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    before = scheduler.__dict__.get("step")
    scheduler.step = partial(scheduler.step, generator=generator)
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


@dataclass(frozen=True)
class Video:
    """A video and how long it took.

    Attributes:
        latents: `[1, C, T, H, W]`, on the CPU.
        frames: `[T, H, W, 3]` in [0, 1] on rank 0, else None.
        tiles_by_rank: how many tiles each rank decoded; all 0 where rank 0 decoded it whole.
        step_seconds: seconds of each denoising step, one list a repetition.
    """

    prompt: EncodedPrompt
    latents: Tensor
    frames: Tensor | None
    tiles_by_rank: list[int]
    step_seconds: tuple[tuple[float, ...], ...]

    @property
    def finite(self) -> bool:
        return bool(self.latents.isfinite().all())


@dataclass(frozen=True)
class VideoMaker:
    """The pipeline and what one video is to be; `own_lora`: whether the videos of the pipeline differ in LoRA weights."""

    pipe: Any
    arguments: GenerateArguments
    ranks: Ranks
    start: Start
    own_lora: bool = False

    def make(self, prompt: EncodedPrompt, stages: Stages, repeat: int = 1) -> Video:
        """Denoise on every rank; decode on rank 0, or where the video is in tiles on every rank. A collective call."""
        if self.own_lora:
            use_lora(self.pipe, self.arguments)
        seconds = []
        for _ in range(repeat):
            clock = StepClock(self.ranks.device)
            with stages.measure("denoise"):
                latents = denoise(self.pipe, self.arguments, prompt, clock, self.start)
            seconds.append(tuple(clock.seconds))
        decoding = VideoDecoding(self.pipe, latents, self.ranks)
        if self.arguments.vae_tiling:
            self.ranks.say(f"decode: {decoding}")
        with stages.measure("decode"):
            with tqdm(total=decoding.parts, desc="decode", unit="part", disable=not self.ranks.first) as bar:
                self.ranks.together(lambda: self._decode(decoding, bar.update))
            with says_what_helps(self.arguments.memory, DECODE):
                frames = decoding.frames()
        frame = None if frames is None else frames[0]
        return Video(prompt, latents.cpu(), frame, decoding.tiles_by_rank, tuple(seconds))

    def _decode(self, decoding: VideoDecoding, on_part: Callable[[], Any]) -> None:
        with says_what_helps(self.arguments.memory, DECODE):
            decoding.work(on_part)

    @property
    def _fps(self) -> int:
        assert self.arguments.fps is not None  # filled
        return self.arguments.fps

    def _made(self, video: Video, frames: Tensor) -> dict[str, Any]:
        """What was made, from the frames, the steps and the pipeline that made them."""
        arguments, pipe = self.arguments, self.pipe
        boundary_ratio = pipe.config.get("boundary_ratio")  # video-to-video has none
        second = arguments.guidance_scale if arguments.guidance_scale_2 is None else arguments.guidance_scale_2
        return {
            "height": frames.shape[1],
            "width": frames.shape[2],
            "num_frames": frames.shape[0],
            "fps": self._fps,
            "num_inference_steps": len(video.step_seconds[-1]),
            "guidance_scale": arguments.guidance_scale,
            "guidance_scale_2": second if boundary_ratio is not None else None,
            "boundary_ratio": boundary_ratio,
            "scheduler": type(pipe.scheduler).__name__,
            "negative_prompt": arguments.negative_prompt,
            "seed": arguments.seed,
            "flow_shift": shift_of(pipe.scheduler),
            "strength": arguments.strength,
            "conditioning_scale": arguments.conditioning_scale,
            "reference_image": list(arguments.reference_image),
            **self.start.told(arguments),
            **lora_told(arguments),
        }

    def save(self, video: Video, number: int, count: int, stages: Stages) -> dict[str, Any]:
        """Write the video of this number among `count` on rank 0, and tell the report about it."""
        arguments = self.arguments
        path = numbered(arguments.output_path(), number, count)
        told: dict[str, Any] = {"prompt": video.prompt.text, "output": str(path), "latents_finite": video.finite}
        told["step_seconds"] = video.step_seconds
        told["decode"] = {"tiles_by_rank": video.tiles_by_rank}
        if video.frames is not None:
            told["made"] = self._made(video, video.frames)
        if not video.finite:
            self.ranks.say(f"warning: the latents of {path} are not finite; try --dtype float32")
        tensor_paths = {name: numbered(p, number, count) for name, p in arguments.tensor_paths().items()}
        if video.frames is not None:
            tensors = {"output_latents": video.latents, "output_frames": video.frames}
            with stages.measure("save"):
                save_video(video.frames, path, self._fps)
                for name, tensor_path in tensor_paths.items():
                    save_tensor(tensors[name], tensor_path)
        told |= {name: str(tensor_path) for name, tensor_path in tensor_paths.items()}
        self.ranks.say(f"video: {path}")
        return told


def _random_prompt(pipe: Any, text: str, guided: bool, device: torch.device) -> EncodedPrompt:
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    draws = [torch.randn(1, _TEXT_LENGTH, config.text_dim, generator=generator).to(device) for _ in range(2)]
    return EncodedPrompt(text, draws[0], draws[1] if guided else None)
