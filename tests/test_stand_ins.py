"""Models as wide as the published ones, with random weights: their sizes, and a job with narrow ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sp_sparse.generate.models as models
from sp_sparse.generate import random_models
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.models import find_model, load_pipeline
from sp_sparse.generate.placement import Placement
from sp_sparse.generate.random_models import random_stand_in
from sp_sparse.generate.real_sizes import T2V_A14B, TI2V_5B, RealSize

_NARROW_TEXT = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
CPU, META = torch.device("cpu"), torch.device("meta")
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
    pipe = random_stand_in(size, size.layers, True, False, META, META, torch.bfloat16)
    assert _count(pipe.transformer) == pytest.approx(expert, rel=1e-3)
    assert (pipe.transformer_2 is None) == (size.experts == 1)
    assert _count(pipe.text_encoder) == pytest.approx(5.681e9, rel=1e-3)
    assert _count(pipe.vae) == pytest.approx(vae, rel=1e-3)


@pytest.mark.parametrize("size", [T2V_A14B, TI2V_5B], ids=["A14B", "TI2V-5B"])
def test_weights_have_the_types_that_loading_gives_them(size: RealSize) -> None:
    pipe = random_stand_in(_narrow(size), 2, True, False, CPU, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float32}
    block = pipe.transformer.blocks[1]
    assert (block.attn1.to_q.weight.dtype, block.scale_shift_table.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.config.boundary_ratio == size.boundary_ratio
    assert bool(pipe.config.expand_timesteps) == size.per_token


@pytest.mark.parametrize("size", [T2V_A14B, TI2V_5B], ids=["A14B", "TI2V-5B"])
def test_weights_are_drawn_on_one_device_and_wait_on_another(size: RealSize, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.device("cpu", 0)
    real: dict[str, Any] = {}
    drawers: list[str] = []

    def spy(name: str, *given: Any, **how: Any) -> Any:
        assert torch.get_default_device() == drawn, name
        drawers.append(name)
        return real[name](*given, **how)

    for name in ("_transformer", "_text_encoder", "_vae"):
        real[name] = getattr(random_models, name)
        monkeypatch.setattr(random_models, name, partial(spy, name))
    pipe = random_stand_in(_narrow(size), 2, True, False, drawn, META, torch.bfloat16)
    assert drawers == ["_text_encoder", "_vae", *["_transformer"] * (1 + 2) * size.experts]
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 2 + size.experts
    assert {tensor.device for part in parts for tensor in (*part.parameters(), *part.buffers())} == {META}


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("placed", [False, True], ids=["whole", "placed"])
@pytest.mark.parametrize("kind", ["none", "idle", "layers"])
def test_weights_are_the_same_wherever_they_wait(
    model: str, placed: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "random_stand_in", lambda size, *given: random_stand_in(_narrow(size), *given))

    def loaded(*flags: str) -> Any:
        arguments = parse_arguments(["--model", model, "--layers", "2", "--full", *flags])
        return load_pipeline(arguments, find_model(arguments, CPU), CPU)

    plain = loaded()
    if placed:
        monkeypatch.setattr(models, "placement_of", lambda a, device, dtype: Placement(device, dtype, False, None))
    pipe = loaded("--offload", kind)
    for name in ("text_encoder", "vae", "transformer", "transformer_2"):
        if getattr(plain, name) is not None:
            wanted, found = (dict(getattr(p, name).named_parameters()) for p in (plain, pipe))
            assert wanted.keys() == found.keys()
            assert all(torch.equal(tensor, found[weight]) for weight, tensor in wanted.items()), name


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
