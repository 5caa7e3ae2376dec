"""Models as wide as the published ones, with random weights: their sizes, and a job with narrow ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sp_sparse.generate.models as models
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.random_models import random_stand_in
from sp_sparse.generate.real_sizes import T2V_A14B, TI2V_5B, RealSize

_NARROW_TEXT = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SIZES = {"a14b-random": T2V_A14B, "ti2v-5b-random": TI2V_5B}


def _narrow(size: RealSize) -> RealSize:
    """The same topology, a few numbers wide."""
    return replace(
        size,
        transformer={
            **size.transformer,
            **{"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32, "freq_dim": 64},
        },
        vae={**size.vae, "base_dim": 4, "decoder_base_dim": 8 if "decoder_base_dim" in size.vae else None},
        text_encoder={**size.text_encoder, **_NARROW_TEXT},
    )


def _count(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "expert", "vae"), [(T2V_A14B, 14.288e9, 126.9e6), (TI2V_5B, 5.000e9, 704.7e6)], ids=["A14B", "TI2V-5B"]
)
def test_whole_models_have_the_published_number_of_weights(size: RealSize, expert: float, vae: float) -> None:
    pipe = random_stand_in(size, size.layers, True, False, torch.device("meta"), torch.bfloat16)
    assert _count(pipe.transformer) == pytest.approx(expert, rel=1e-3)
    assert (pipe.transformer_2 is None) == (size.experts == 1)
    assert _count(pipe.text_encoder) == pytest.approx(5.681e9, rel=1e-3)
    assert _count(pipe.vae) == pytest.approx(vae, rel=1e-3)


@pytest.mark.parametrize("size", [T2V_A14B, TI2V_5B], ids=["A14B", "TI2V-5B"])
def test_weights_have_the_types_that_loading_gives_them(size: RealSize) -> None:
    pipe = random_stand_in(_narrow(size), 2, True, False, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float32}
    block = pipe.transformer.blocks[1]
    assert (block.attn1.to_q.weight.dtype, block.scale_shift_table.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.config.boundary_ratio == size.boundary_ratio
    assert bool(pipe.config.expand_timesteps) == size.per_token


@pytest.mark.parametrize(
    ("model", "full", "from_image"),
    [*((model, full, False) for model in SIZES for full in (False, True)), ("ti2v-5b-random", True, True)],
)
def test_a_job_of_a_narrow_stand_in(
    model: str, full: bool, from_image: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(size: RealSize, *given: Any) -> Any:
        return random_stand_in(_narrow(size), *given)

    monkeypatch.setattr(models, "random_stand_in", narrow)
    tensor = tmp_path / "frames.pt"
    flags = ["--model", model, "--layers", "2", "--height", "64", "--width", "64", "--num-frames", "5"]
    flags += ["--num-inference-steps", "2", "--sparse-attn-backend", "reference", "--sparse-attn-block-size", "16"]
    flags += ["--output", str(tmp_path / "video.mp4"), "--output-frames", str(tensor)]
    if from_image:
        Image.new("RGB", (64, 64), "teal").save(tmp_path / "image.png")
        flags += ["--image", str(tmp_path / "image.png")]
    assert main([*flags, *["--full"] * full]) == 0
    frames = torch.load(tensor, weights_only=True)
    assert frames.shape == (5, 64, 64, 3)
    assert frames.isfinite().all()
    assert frames.std() > 0.01
