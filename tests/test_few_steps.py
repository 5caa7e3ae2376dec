"""Settings of few-step models: LoRA weights, the boundary of the experts, guidance 1, the schedulers of distilled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.models import find_model, load_pipeline, shift_of
from sp_sparse.generate.random_models import tiny_text_to_video
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.ranks import run_ranks

SMALL = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4", "--guidance-scale", "1"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]


def _lora(path: Path, seed: int) -> str:
    """As the distillation projects write it: a query of each block, with an alpha of half the rank."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for block in range(2):
        key = f"diffusion_model.blocks.{block}.self_attn.q"
        weights[f"{key}.lora_down.weight"] = torch.randn(4, 128, generator=generator)
        weights[f"{key}.lora_up.weight"] = torch.randn(128, 4, generator=generator)
        weights[f"{key}.alpha"] = torch.tensor(2.0)
    weights["diffusion_model.blocks.1.self_attn.norm_q.diff"] = torch.randn(128, generator=generator) * 0.2
    save_file(weights, path)
    return str(path)


def _loaded(*flags: str) -> Any:
    arguments = parse_arguments(["--model", "tiny", *flags])
    return load_pipeline(arguments, find_model(arguments, torch.device("cpu")), torch.device("cpu"))


def _latents(folder: Path, name: str, *flags: str) -> Tensor:
    tensor = folder / f"{name}.pt"
    assert main([*flags, "--output", str(folder / f"{name}.mp4"), "--output-latents", str(tensor)]) == 0
    latents: Tensor = torch.load(tensor, weights_only=True)
    return latents


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--lora-scale", "0.5"], "--lora-scale weighs --lora, which is not given"),
        (["--lora", "a/b,c/d", "--lora-scale", "1,1,1"], "3 numbers for 2 sources of --lora; give one for all, or 2"),
        (["--lora-2", "a/b", "--lora-scale-2", "nan"], "--lora-scale-2 nan is not a number from -100 to 100"),
        (["--lora", "a/b", "--lora-scale", "101"], "--lora-scale 101.0 is not a number from"),
        (
            ["--lora", "a/b,c/d,a/b"],
            "--lora a/b is given twice; give it once, with the sum of both weights as --lora-scale",
        ),
        (["--boundary-ratio", "1"], "leaves the first expert no step"),
        (["--boundary-ratio", "0"], "--boundary-ratio 0.0 is outside"),
    ],
)
def test_refused(flags: list[str], text: str) -> None:
    for parse in (parse_arguments, parse_serve_arguments):
        with pytest.raises(ValueError, match=text):
            parse(flags)


def test_one_expert_has_no_boundary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "tiny-ti2v", "--boundary-ratio", "0.5"]) == 2
    assert "which tiny-ti2v has not; leave --boundary-ratio out" in capsys.readouterr().err


def test_the_boundary_is_that_of_the_pipeline() -> None:
    assert _loaded("--boundary-ratio", "0.4").config.boundary_ratio == 0.4
    assert _loaded().config.boundary_ratio == 0.875


@pytest.mark.parametrize(("scales", "expected"), [((), (1, 1)), (("0.5",), (0.5, 0.5)), (("0.25,-2",), (0.25, -2))])
def test_a_layer_is_changed_by_the_scaled_weights(
    scales: tuple[str, ...], expected: tuple[float, float], tmp_path: Path
) -> None:
    sources = [_lora(tmp_path / f"{seed}.safetensors", seed) for seed in range(2)]
    flags = [flag for scale in scales for flag in ("--lora-scale-2", scale)]
    layer = _loaded("--lora-2", ",".join(sources), *flags).transformer_2.blocks[1].attn1.to_q
    plain = _loaded().transformer_2.blocks[1].attn1.to_q
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(9))
    wanted = plain(x)
    for seed, scale in enumerate(expected):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(4, 128), (128, 4)] * 2
        *_, down, up = [torch.randn(*shape, generator=generator) for shape in shapes]
        wanted = wanted + scale * 2.0 / 4.0 * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-3)


def test_without_guidance_one_branch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards, forward = [], diffusers.WanTransformer3DModel.forward

    def counted(*given: Any, **named: Any) -> Any:
        forwards.append(1)
        return forward(*given, **named)

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", counted)
    _latents(tmp_path, "one", "--model", "tiny", *SMALL)
    assert len(forwards) == 4


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


@pytest.mark.parametrize("scheduler", ["euler", "lcm"])
def test_few_steps_are_those_that_distilled_models_were_taught_at(scheduler: str) -> None:
    steps = _loaded("--scheduler", scheduler, "--flow-shift", "5").scheduler
    steps.set_timesteps(4, device="cpu")
    torch.testing.assert_close(steps.timesteps, torch.tensor([1000, 937.5, 1000 * 5 / 6, 625.0]))
    assert steps.sigmas[-1] == 0
    steps.set_timesteps(8)
    assert steps.timesteps[-1] == pytest.approx(1000 * 5 / 12)


def test_a_scheduler_by_name_keeps_the_models_shift() -> None:
    for name in ("unipc", "euler", "lcm"):
        assert shift_of(_loaded("--scheduler", name).scheduler) == 3.0
        assert shift_of(_loaded("--scheduler", name, "--flow-shift", "7").scheduler) == 7.0


def test_euler_follows_the_velocity() -> None:
    steps = _loaded("--scheduler", "euler", "--flow-shift", "5").scheduler
    steps.set_timesteps(4)
    x, v = torch.randn(1, 4), torch.randn(1, 4)
    moved = steps.step(v, steps.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(moved, x + (0.9375 - 1.0) * v)


def test_a_scheduler_without_a_shift_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_text_to_video(torch.float32)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), *SMALL, "--scheduler", "lcm", "--output", str(tmp_path / "video.mp4")]
    assert main(flags) == 2
    assert "--scheduler lcm needs a shift, and the scheduler of" in capsys.readouterr().err
    assert main([*flags, "--flow-shift", "5"]) == 0


@pytest.mark.parametrize("scheduler", ["FlowMatchLCMScheduler", "euler", "lcm"])
def test_four_steps_with_lora_equal_one_rank(scheduler: str, tmp_path: Path) -> None:
    """Those of the model's folder, by the name of their class, and those by flag."""
    model, by_flag = "tiny", ["--scheduler", scheduler]
    if hasattr(diffusers, scheduler):
        pipe = tiny_text_to_video(torch.float32)
        pipe.scheduler = getattr(diffusers, scheduler)(shift=1.0)
        pipe.save_pretrained(tmp_path / "model")
        model, by_flag = str(tmp_path / "model"), []
    lora = _lora(tmp_path / "fast.safetensors", 1)
    flags = ["--model", model, *by_flag, *SMALL, *SPARSE, "--flow-shift", "5", "--lora", lora, "--lora-2", lora]
    flags += ["--lora-scale", "0.5"]
    one = _latents(tmp_path, "one", *flags)
    assert not torch.equal(one, _latents(tmp_path, "unlike", *flags, "--lora-scale-2", "0.25"))
    # LCM draws noise at every step, so it goes to the hybrid too.
    meshes: list[tuple[str, ...]] = [("ulysses",), ("ring",)] + [("ulysses", "ring")] * (scheduler == "lcm")
    for mesh in meshes:
        tensor = tmp_path / f"{'_'.join(mesh)}.pt"
        places = ["--output", str(tensor.with_suffix(".mp4")), "--output-latents", str(tensor)]
        degrees = [f"--{degree}-degree=2" for degree in mesh]
        run_ranks(2 ** len(mesh), _rank_generates, [*flags, *degrees, *places])
        torch.testing.assert_close(torch.load(tensor, weights_only=True), one, rtol=1e-3, atol=1e-4)
