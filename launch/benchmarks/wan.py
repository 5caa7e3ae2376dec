"""The Wan transformer that is measured, its inputs, and what makes it attend one way or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from launch.benchmarks.arguments import TransformerArguments
from sp_sparse.generate.random_models import random_a14b_transformer


def build_model(arguments: TransformerArguments, device: torch.device) -> Any:
    """In the shape of A14B unless the arguments say otherwise, made on `device`, with dense attention."""
    model = random_a14b_transformer(
        arguments.layers,
        device,
        getattr(torch, arguments.dtype),
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.head_dim,
        ffn_dim=arguments.ffn_dim,
        text_dim=arguments.text_dim,
    )
    # The default backend leaves the choice to torch, which takes FlashAttention-2, and returns no LSE for diffusers' ring.
    model.set_attention_backend(dense_backend(device))
    return model


def build_parallel_model(arguments: TransformerArguments, device: torch.device, ulysses: int, ring: int) -> Any:
    """`build_model` whose tokens diffusers shards by its own parallelism, which cannot be undone."""
    from diffusers import ContextParallelConfig

    model = build_model(arguments, device)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
    return model


def dense_backend(device: torch.device) -> str:
    """diffusers' name of the dense attention that is measured."""
    return "_native_cudnn" if device.type == "cuda" else "native"


def forward_calls(
    model: Any, arguments: TransformerArguments, latents: tuple[int, int, int], device: torch.device
) -> Callable[[int], Any]:
    """A forward pass that takes turns at two random inputs, which are the same on every rank."""
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    inputs = [
        {
            "hidden_states": noise(1, model.config.in_channels, *latents),
            "timestep": torch.tensor([time], device=device),
            "encoder_hidden_states": noise(1, arguments.text_tokens, arguments.text_dim),
        }
        for time in (900, 500)
    ]
    return lambda number: model(**inputs[number % len(inputs)], return_dict=False)


def tokens_of(latents: tuple[int, int, int]) -> int:
    """Tokens of a video: patches are 1 x 2 x 2."""
    frames, height, width = latents
    return frames * (height // 2) * (width // 2)


def why_no_diffusers_parallelism(device: torch.device) -> str | None:
    """diffusers asks torch for the number of accelerators, and a CPU is none."""
    return None if device.type == "cuda" else "diffusers' own parallelism needs GPUs"
