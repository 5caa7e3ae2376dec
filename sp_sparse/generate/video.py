"""From prompts to videos, in the steps that a pipeline does at once: encode, denoise, decode, save."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.decode import VideoDecoding
from sp_sparse.generate.files import numbered, save_video, whole_file
from sp_sparse.generate.lora import lora_told, use_lora
from sp_sparse.generate.models import shift_of
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.stages import Stages, StepClock

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
    texts = [(video.prompt, video.negative_prompt) for video in videos]
    encoded = {text: encode_prompt(pipe, videos[texts.index(text)], text[0], device) for text in dict.fromkeys(texts)}
    pipe.text_encoder = None
    return [encoded[text] for text in texts]


@torch.no_grad()
def encode_prompt(pipe: Any, arguments: GenerateArguments, text: str, device: torch.device) -> EncodedPrompt:
    """Encode one prompt; a model without a text encoder gets random numbers."""
    guided = arguments.guidance_scale is None or arguments.guidance_scale > 1
    if pipe.text_encoder is None:
        return _random_prompt(pipe, text, guided, device)
    embeds, negative = pipe.encode_prompt(
        text, arguments.negative_prompt, guided, max_sequence_length=_TEXT_LENGTH, device=device
    )
    return EncodedPrompt(text, embeds, negative)


def denoise(
    pipe: Any,
    arguments: GenerateArguments,
    prompt: EncodedPrompt,
    clock: StepClock,
    image: Any | None,
    seeds: Sequence[int] = (),
) -> Tensor:
    """The final latents `[B, C, T, H, W]`, from the noise of `seeds`, one a prompt; by default that of the arguments."""
    inputs: dict[str, Any] = {}
    if image is not None:
        assert arguments.height is not None  # filled
        assert arguments.width is not None
        inputs["image"] = fill_frame(image, arguments.height, arguments.width)
    # A pipeline without a second expert refuses its guidance scale.
    if arguments.guidance_scale_2 is not None:
        inputs["guidance_scale_2"] = arguments.guidance_scale_2
    # On the CPU: the same noise on every rank and device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or (arguments.seed,)]
    generator = generators[0] if len(generators) == 1 else generators
    with seeded_steps(pipe.scheduler, generator):
        latents: Tensor = pipe(
            prompt_embeds=prompt.embeds,
            negative_prompt_embeds=prompt.negative,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.num_frames,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            generator=generator,
            output_type="latent",
            callback_on_step_end=clock,
            **inputs,
        ).frames
    return latents


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


def first_frame(arguments: GenerateArguments) -> Any:
    """The image that the video starts from; where none is given, a drawn one."""
    from PIL import Image, ImageOps

    if arguments.image is not None:
        with Image.open(arguments.image) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    height, width = arguments.height or 1, arguments.width or 1
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (rows * 255 // height, columns * 255 // width, (rows // 16 + columns // 16) % 2 * 255)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def fill_frame(image: Any, height: int, width: int) -> Any:
    """The picture scaled until it fills the frame, and cropped equally on two sides: stretching would distort it."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def cropped_share(picture: tuple[int, int], height: int, width: int) -> float:
    """The share of a picture of this width and height that `fill_frame` crops."""
    wide = picture[0] * height / (picture[1] * width)
    return 1.0 - min(wide, 1.0 / wide)


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
    image: Any | None
    own_lora: bool = False

    def make(self, prompt: EncodedPrompt, stages: Stages, repeat: int = 1) -> Video:
        """Denoise on every rank; decode on rank 0, or where the video is in tiles on every rank. A collective call."""
        if self.own_lora:
            use_lora(self.pipe, self.arguments)
        seconds = []
        for _ in range(repeat):
            clock = StepClock(self.ranks.device)
            with stages.measure("denoise"):
                latents = denoise(self.pipe, self.arguments, prompt, clock, self.image)
            seconds.append(tuple(clock.seconds))
        decoding = VideoDecoding(self.pipe, latents, self.ranks)
        if self.arguments.vae_tiling:
            self.ranks.say(f"decode: {decoding}")
        with stages.measure("decode"):
            with tqdm(total=decoding.parts, desc="decode", unit="part", disable=not self.ranks.first) as bar:
                self.ranks.together(lambda: decoding.work(bar.update))
            frames = decoding.frames()
        frame = None if frames is None else frames[0]
        return Video(prompt, latents.cpu(), frame, decoding.tiles_by_rank, tuple(seconds))

    @property
    def _fps(self) -> int:
        assert self.arguments.fps is not None  # filled
        return self.arguments.fps

    def _made(self, video: Video, frames: Tensor) -> dict[str, Any]:
        """What was made, from the frames, the steps and the pipeline that made them."""
        arguments, pipe = self.arguments, self.pipe
        two_experts = pipe.config.boundary_ratio is not None
        second = arguments.guidance_scale if arguments.guidance_scale_2 is None else arguments.guidance_scale_2
        return {
            "height": frames.shape[1],
            "width": frames.shape[2],
            "num_frames": frames.shape[0],
            "fps": self._fps,
            "num_inference_steps": len(video.step_seconds[-1]),
            "guidance_scale": arguments.guidance_scale,
            "guidance_scale_2": second if two_experts else None,
            "boundary_ratio": pipe.config.boundary_ratio,
            "scheduler": type(pipe.scheduler).__name__,
            "negative_prompt": arguments.negative_prompt,
            "seed": arguments.seed,
            "flow_shift": shift_of(pipe.scheduler),
            "image": self.image_told(),
            **lora_told(arguments),
        }

    def image_told(self) -> dict[str, Any] | None:
        """The picture that the video starts from, and how much of it was cropped; None without one of the user's."""
        arguments = self.arguments
        if self.image is None or arguments.image is None:
            return None
        assert arguments.height is not None  # filled
        assert arguments.width is not None
        width, height = self.image.size
        cropped = cropped_share((width, height), arguments.height, arguments.width)
        return {"path": arguments.image, "width": width, "height": height, "cropped_share": cropped}

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
        tensors = {"output_latents": video.latents, "output_frames": video.frames}
        tensor_paths = {name: numbered(p, number, count) for name, p in arguments.tensor_paths().items()}
        if video.frames is not None:
            with stages.measure("save"):
                save_video(video.frames, path, self._fps)
                for name, tensor_path in tensor_paths.items():
                    with whole_file(tensor_path) as temporary:
                        torch.save(tensors[name], temporary)
        told |= {name: str(tensor_path) for name, tensor_path in tensor_paths.items()}
        self.ranks.say(f"video: {path}")
        return told


def _random_prompt(pipe: Any, text: str, guided: bool, device: torch.device) -> EncodedPrompt:
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    draws = [torch.randn(1, _TEXT_LENGTH, config.text_dim, generator=generator).to(device) for _ in range(2)]
    return EncodedPrompt(text, draws[0], draws[1] if guided else None)
