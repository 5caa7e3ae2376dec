"""Rendering one video in several ways from the same noise: the model's own attention, another dense kernel, a setting."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_sparse.fidelity.metrics import as_bytes
from sp_sparse.fidelity.store import Frames
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.decode import decode
from sp_sparse.generate.memory import DECODE, says_what_helps
from sp_sparse.generate.models import WanModel, transformers_of
from sp_sparse.generate.stages import StepClock, synchronize
from sp_sparse.generate.start import Start
from sp_sparse.generate.video import EncodedPrompt, denoise, drop_text_encoder, encode_prompt

# (prompt, seed)
Video = tuple[str, int]


@dataclass(frozen=True)
class Latents:
    """What denoising gave, `[B, C, T, H, W]`, and how long it took all of them."""

    latents: Tensor
    seconds: float

    @property
    def finite(self) -> list[bool]:
        """Of each video."""
        flags: list[bool] = self.latents.isfinite().flatten(1).all(1).tolist()
        return flags


@dataclass(frozen=True)
class Renderer:
    """A pipeline with everything that all videos share.

    Attributes:
        pipe: the diffusers pipeline.
        arguments: sizes, steps and guidance, filled in.
        device: where it computes.
        prompts: encoded, by their texts.
        start: what all videos start from.
    """

    pipe: Any
    arguments: GenerateArguments
    device: torch.device
    prompts: Mapping[str, EncodedPrompt]
    start: Start

    @classmethod
    def of(
        cls, pipe: Any, arguments: GenerateArguments, device: torch.device, texts: Iterable[str], model: WanModel
    ) -> Renderer:
        """Encode the prompts, then drop the text encoder."""
        pipe.set_progress_bar_config(disable=True)
        prompts = {text: encode_prompt(pipe, arguments, text, device) for text in texts}
        drop_text_encoder(pipe)
        return cls(pipe, arguments, device, prompts, Start.of(arguments, model))

    def denoise(self, videos: Sequence[Video]) -> Latents:
        """All of them together, each from the noise of its seed, by whatever attention the pipeline has now."""
        prompts = [self.prompts[prompt] for prompt, _ in videos]
        seeds = [seed for _, seed in videos]
        synchronize(self.device)
        start = time.perf_counter()
        clock = StepClock(self.device)
        latents = denoise(self.pipe, self.arguments, _together(prompts), clock, self.start, seeds)
        synchronize(self.device)
        return Latents(latents, time.perf_counter() - start)

    def decode(self, latents: Latents) -> list[Frames]:
        """Frames `[T, H, W, 3]` of 8 bits of each video, by the same VAE for all."""
        with says_what_helps(self.arguments.memory, DECODE):
            return [as_bytes(frames) for frames in decode(self.pipe, latents.latents, lambda: None)]

    @property
    def layers(self) -> int:
        return len(self.pipe.transformer.blocks)

    @property
    def heads(self) -> int:
        heads: int = self.pipe.transformer.config.num_attention_heads
        return heads


def _together(prompts: Sequence[EncodedPrompt]) -> EncodedPrompt:
    negatives = [prompt.negative for prompt in prompts if prompt.negative is not None]
    return EncodedPrompt(
        ", ".join(prompt.text for prompt in prompts),
        torch.cat([prompt.embeds for prompt in prompts]),
        torch.cat(negatives) if negatives else None,
    )


@contextmanager
def other_dense_kernel(pipe: Any) -> Iterator[None]:
    """Within it, torch's dense attention runs by a kernel that it does not take of itself.

    In half precision on GPUs that is the memory-efficient one instead of FlashAttention or cuDNN, else the one that writes
    out the scores, for which long float32 sequences may lack the memory.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = transformers_of(pipe)[0].blocks[0].attn1.to_q.weight.dtype  # the weights may wait on the CPU
    is_half = pipe.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if is_half else SDPBackend.MATH):
        yield
