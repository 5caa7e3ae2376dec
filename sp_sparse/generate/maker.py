"""Makes videos one after the other with one pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.files import numbered, whole_file
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.stages import Stages, StepClock
from sp_sparse.generate.video import EncodedPrompt, decode, denoise, save_video


@dataclass(frozen=True)
class Video:
    """A video and how long it took.

    Attributes:
        latents: `[1, C, T, H, W]`, on the CPU.
        frames: `[T, H, W, 3]` in [0, 1] on rank 0, else None.
        step_seconds: seconds of each denoising step, one list a repetition.
    """

    prompt: EncodedPrompt
    latents: Tensor
    frames: Tensor | None
    step_seconds: tuple[tuple[float, ...], ...]

    @property
    def finite(self) -> bool:
        return bool(self.latents.isfinite().all())


@dataclass(frozen=True)
class VideoMaker:
    """The pipeline with everything that its videos share."""

    pipe: Any
    arguments: GenerateArguments
    ranks: Ranks
    image: Any | None

    def make(self, prompt: EncodedPrompt, stages: Stages, repeat: int = 1) -> Video:
        """Denoise on every rank, decode on rank 0; the other ranks go on."""
        seconds = []
        for _ in range(repeat):
            clock = StepClock(self.ranks.device)
            with stages.measure("denoise"):
                latents = denoise(self.pipe, self.arguments, prompt, clock, self.image)
            seconds.append(tuple(clock.seconds))
        frames = None
        if self.ranks.first:
            with (
                stages.measure("decode"),
                tqdm(total=latents.shape[2], desc="decode", unit="latent frame") as bar,
            ):
                frames = decode(self.pipe, latents, bar.update)
        return Video(prompt, latents.cpu(), frames, tuple(seconds))

    def save(self, video: Video, number: int, stages: Stages) -> dict[str, Any]:
        """Write the video of this number on rank 0, and tell the report about it."""
        arguments, count = self.arguments, len(self.arguments.prompts)
        path = numbered(arguments.output_path(), number, count)
        told: dict[str, Any] = {"prompt": video.prompt.text, "output": str(path), "latents_finite": video.finite}
        told["step_seconds"] = video.step_seconds
        if not video.finite:
            self.ranks.say(f"warning: the latents of {path} are not finite; try --dtype float32")
        tensors = {"output_latents": video.latents, "output_frames": video.frames}
        tensor_paths = {name: numbered(p, number, count) for name, p in arguments.tensor_paths().items()}
        if video.frames is not None:
            with stages.measure("save"):
                save_video(video.frames, path, arguments.fps or 16)
                for name, tensor_path in tensor_paths.items():
                    with whole_file(tensor_path) as temporary:
                        torch.save(tensors[name], temporary)
        told |= {name: str(tensor_path) for name, tensor_path in tensor_paths.items()}
        self.ranks.say(f"video: {path}")
        return told
