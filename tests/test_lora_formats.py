"""LoRA weights as diffusers, peft, musubi-tuner, DiffSynth and the distillation projects write them: every weight counts, or
the file is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.lora import use_lora
from sp_sparse.generate.lora_names import LayerNames, read_key, wan_name
from sp_sparse.generate.models import find_model, load_pipeline
from tests.ranks import run_ranks

SMALL = ["--model", "tiny", "--height", "64", "--width", "64", "--num-frames", "5"]
SMALL += ["--num-inference-steps", "2", "--guidance-scale", "1"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]
RANK, ALPHA = 4, 2.0

# Layers, by diffusers' names, with outputs and inputs.
LAYERS = {
    "blocks.0.attn1.to_q": (128, 128),
    "blocks.1.attn1.to_out.0": (128, 128),
    "blocks.1.attn2.to_k": (128, 128),
    "blocks.0.ffn.net.0.proj": (64, 128),
    "blocks.1.ffn.net.2": (128, 64),
    "condition_embedder.text_embedder.linear_1": (128, 32),
    "condition_embedder.time_embedder.linear_2": (128, 128),
    "condition_embedder.time_proj": (768, 128),
    "proj_out": (64, 128),
}
# What distillation changes beside: differences of whole parameters.
DIFFERENCES = {
    "blocks.1.attn1.norm_q.weight": (128,),
    "blocks.0.attn2.norm_k.weight": (128,),
    "blocks.1.norm2.weight": (128,),
    "blocks.1.norm2.bias": (128,),
    "blocks.0.attn1.to_v.bias": (128,),
    "blocks.0.scale_shift_table": (1, 6, 128),
    "scale_shift_table": (1, 2, 128),
    "patch_embedding.weight": (128, 16, 1, 2, 2),
    "proj_out.bias": (64,),
}


def _factors(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer, of another rank in the last."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer, (outputs, inputs) in LAYERS.items():
        rank = 2 if layer == "proj_out" else RANK
        found[layer] = (
            torch.randn(rank, inputs, generator=generator) * 0.1,
            torch.randn(outputs, rank, generator=generator) * 0.1,
        )
    return found


def _loaded(*flags: str) -> Any:
    arguments = parse_arguments(["--model", "tiny", *flags])
    return load_pipeline(arguments, find_model(arguments, torch.device("cpu")), torch.device("cpu"))


def _weight(transformer: Any, layer: str) -> Tensor:
    """The layer's weight with all that is active of LoRA, from what it makes of the unit vectors."""
    module = transformer.get_submodule(layer)
    inputs = torch.eye(LAYERS[layer][1])
    with torch.no_grad():
        changed: Tensor = module(inputs) - module(torch.zeros_like(inputs))
    return changed.T


def _check_weights(changed: Any, scale_of: Callable[[int], float], strength: float = 1.0) -> None:
    plain = _loaded().transformer
    for layer, (down, up) in _factors().items():
        wanted = plain.get_submodule(layer).weight + strength * scale_of(down.shape[0]) * up @ down
        torch.testing.assert_close(_weight(changed, layer), wanted, rtol=1e-4, atol=1e-4)


def _lightx2v(layer: str) -> str:
    return f"diffusion_model.{wan_name(layer)}"


def _musubi(layer: str) -> str:
    return "lora_unet_" + wan_name(layer).replace(".", "_")


def _video_x_fun(layer: str) -> str:
    return "lora_unet__" + wan_name(layer).replace(".", "_")


FORMATS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "lightx2v": (_lightx2v, "lora_down.weight", "lora_up.weight", True),
    "lightx2v-A": (_lightx2v, "lora_A.weight", "lora_B.weight", False),
    "musubi": (_musubi, "lora_down.weight", "lora_up.weight", True),
    "VideoX-Fun": (_video_x_fun, "lora_down.weight", "lora_up.weight", True),
    "DiffSynth": (wan_name, "lora_A.default.weight", "lora_B.default.weight", False),
    "peft": (lambda layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight", False),
    "diffusers": (lambda layer: f"transformer.{layer}", "lora_A.weight", "lora_B.weight", False),
    "diffusers-alpha": (lambda layer: f"transformer.{layer}", "lora_A.weight", "lora_B.weight", True),
}


@pytest.mark.parametrize("form", list(FORMATS))
def test_every_layer_is_changed_whoever_wrote_the_file(form: str, tmp_path: Path) -> None:
    named, down_name, up_name, has_alpha = FORMATS[form]
    weights: dict[str, Tensor] = {}
    for layer, (down, up) in _factors().items():
        weights |= {f"{named(layer)}.{down_name}": down, f"{named(layer)}.{up_name}": up}
        if has_alpha:
            weights[f"{named(layer)}.alpha"] = torch.tensor(ALPHA)
    save_file(weights, tmp_path / "lora.safetensors")
    transformer = _loaded("--lora", str(tmp_path / "lora.safetensors"), "--lora-scale", "0.5").transformer
    _check_weights(transformer, lambda rank: ALPHA / rank if has_alpha else 1.0, 0.5)


@pytest.mark.parametrize("by", ["diffusers", "peft", "peft-rslora"])
def test_alpha_is_read_where_peft_keeps_it(by: str, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {}
    prefix = "transformer." if by == "diffusers" else "base_model.model."
    for layer, (down, up) in _factors().items():
        weights |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    config = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"proj_out": 6}, "use_rslora": by.endswith("rslora")}
    name = "pytorch_lora_weights" if by == "diffusers" else "adapter_model"
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(weights, tmp_path / f"{name}.safetensors", told if by == "diffusers" else None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    root = math.sqrt if by.endswith("rslora") else float
    _check_weights(_loaded("--lora", str(tmp_path)).transformer, lambda rank: (6 if rank == 2 else 8) / root(rank))


def _differences() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in DIFFERENCES.items()}


def _distilled(path: Path) -> str:
    """As LightX2V's extractor and CausVid's authors write it: factors, and differences of norms, biases and modulation."""
    weights: dict[str, Tensor] = {}
    for layer, (down, up) in _factors().items():
        weights |= {f"{_lightx2v(layer)}.lora_down.weight": down, f"{_lightx2v(layer)}.lora_up.weight": up}
    for name, difference in _differences().items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale_shift_table" or not layer:
            key = "diffusion_model." + (f"{layer}.diff_m" if layer else "head.diff_m")
        else:
            key = f"{_lightx2v(layer)}.{'diff' if kind == 'weight' else 'diff_b'}"
        weights[key] = difference
    save_file(weights, path)
    return str(path)


def test_differences_are_added_at_the_weight_of_their_file(tmp_path: Path) -> None:
    pipe, plain = _loaded("--lora-2", _distilled(tmp_path / "d.safetensors"), "--lora-scale-2", "0.5"), _loaded()
    for name, difference in _differences().items():
        layer, _, kind = name.rpartition(".")
        module = pipe.transformer_2.get_submodule(layer)
        got = getattr(getattr(module, "base_layer", module), kind)
        torch.testing.assert_close(got, plain.transformer_2.get_parameter(name) + 0.5 * difference)
        assert torch.equal(pipe.transformer.get_parameter(name), plain.transformer.get_parameter(name))
    _check_weights(_loaded("--lora", _distilled(tmp_path / "d.safetensors")).transformer, lambda rank: 1.0)


def test_a_bias_beside_the_factors_is_scaled_as_they_are(tmp_path: Path) -> None:
    layer, (down, up) = next(iter(_factors().items()))
    weights = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": torch.ones(128), "alpha": torch.tensor(ALPHA)}
    save_file({f"transformer.{layer}.{name}": weight for name, weight in weights.items()}, tmp_path / "b.safetensors")
    changed = _loaded("--lora", str(tmp_path / "b.safetensors"), "--lora-scale", "3").transformer.get_submodule(layer)
    plain = _loaded().transformer.get_submodule(layer)
    torch.testing.assert_close(changed.base_layer.bias, plain.bias + 3 * ALPHA / RANK)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["blocks.0.self_attn.q.dora_scale"], "has DoRA weights .*merge them into the model"),
        (["blocks.0.self_attn.q.hada_w1_a"], "has LoHa weights"),
        (["blocks.0.self_attn.q.lokr_w1"], "has LoKr weights"),
        (
            ["blocks.0.self_attn.q.set_weight"],
            "of which 2 fit .* and not diffusion_model.blocks.0.self_attn.q.set_weight",
        ),
        (["blocks.0.norm1.diff"], "and not diffusion_model.blocks.0.norm1.diff"),
        (["blocks.9.norm3.diff"], "and not diffusion_model.blocks.9.norm3.diff"),
        (["blocks.1.norm3.diff"], "and not diffusion_model.blocks.1.norm3.diff"),  # of another shape
        (["blocks.1.ffn.0.alpha"], "and not diffusion_model.blocks.1.ffn.0.alpha"),
        (["blocks.0.self_attn.q.lora_A.weight"], "and not diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
    ],
)
def test_what_would_not_be_applied_is_refused_by_name(
    names: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, source = "diffusion_model.blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    weights = {f"{key}.lora_down.weight": torch.ones(4, 128), f"{key}.lora_up.weight": torch.ones(128, 4)}
    save_file({**weights, **{f"diffusion_model.{name}": torch.ones(()) for name in names}}, source)
    assert main([*SMALL, "--lora", str(source), "--output", str(tmp_path / "video.mp4")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith(f"error: --lora {source} has ")
    assert re.search(text, line)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.1.cross_attn.k_img.lora_down.weight", "blocks.1.attn2.add_k_proj"),
        ("blocks.1.cross_attn.norm_k_img.diff", "blocks.1.attn2.norm_added_k"),
        ("img_emb.proj.0.diff_b", "condition_embedder.image_embedder.norm1"),
        ("img_emb.proj.1.lora_down.weight", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3.diff_b", "condition_embedder.image_embedder.ff.net.2"),
        ("vace_blocks.0.before_proj.lora_down.weight", "vace_blocks.0.proj_in"),
        ("vace_blocks.1.after_proj.lora_down.weight", "vace_blocks.1.proj_out"),
        ("vace_blocks.1.norm3.diff", "vace_blocks.1.norm2"),
        ("vace_patch_embedding.diff", "vace_patch_embedding"),
    ],
)
def test_layers_that_only_some_of_the_family_have(key: str, name: str) -> None:
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    narrow = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attn_norm": True}
    with torch.device("meta"):
        transformer: Any = (
            WanVACETransformer3DModel(vace_layers=[0, 1], **narrow)
            if key.startswith("vace")
            else WanTransformer3DModel(image_dim=1280, added_kv_proj_dim=64, **narrow)
        )
    for prefix in ("diffusion_model.", ""):
        found = read_key(f"{prefix}{key}")
        assert found is not None
        assert LayerNames.of(transformer).find(found) == name


def test_one_of_several_files_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for noise in ("high", "low"):
        _distilled(tmp_path / f"{noise}.safetensors")
    assert main([*SMALL, "--lora", str(tmp_path), "--output", str(tmp_path / "video.mp4")]) == 2
    error = capsys.readouterr().err
    assert f"2 files of weights (high.safetensors, low.safetensors); give one of them, such as {tmp_path}/high" in error


def test_a_file_of_the_hub_is_named_after_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    files = {"owner/name": ["README.md", "high/a.safetensors", "low/a.safetensors"]}
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return _distilled(tmp_path / "fetched.safetensors")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", files.__getitem__)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    _loaded("--lora", "owner/name/low/a.safetensors")
    assert asked == [("owner/name", "low/a.safetensors")]
    with pytest.raises(
        ValueError, match=r"--lora owner/name has 2 files .*give one of them, such as owner/name/high/a"
    ):
        _loaded("--lora", "owner/name")
    with pytest.raises(ValueError, match="--lora owner/other is no file here, and cannot be fetched from the hub"):
        _loaded("--lora", "owner/other")


def _one_layer(path: Path, seed: int) -> str:
    generator, key = torch.Generator().manual_seed(seed), "diffusion_model.blocks.1.self_attn.q.lora_"
    weights = {f"{key}down.weight": torch.randn(4, 128, generator=generator)}
    weights[f"{key}up.weight"] = torch.randn(128, 4, generator=generator)
    save_file(weights, path)
    return str(path)


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def _latents(folder: Path, name: str, *flags: str) -> list[Tensor]:
    assert main([*flags, "--output", str(folder / f"{name}.mp4"), "--output-latents", str(folder / f"{name}.pt")]) == 0
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}*.pt"))]


def test_each_line_has_its_own_lora_weights(tmp_path: Path) -> None:
    first, second = (_one_layer(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    own: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["--lora", first, "--lora-scale", "0.5"]),
        ({"lora": [second, first], "lora_scale": [1, -0.5]}, ["--lora", f"{second},{first}", "--lora-scale=1,-0.5"]),
        ({"lora": []}, []),
        ({"lora_2": second}, ["--lora", first, "--lora-scale", "0.5", "--lora-2", second]),
    ]
    lines = [json.dumps({"prompt": "a cat", **line}) for line, _ in own]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    file = ["--prompt-file", str(tmp_path / "lines.jsonl"), "--lora", first, "--lora-scale", "0.5"]
    made = _latents(tmp_path, "all", *SMALL, *SPARSE, *file, "--verify", "single", "--verify-tolerance", "0")
    for number, (_, flags) in enumerate(own):
        (alone,) = _latents(tmp_path, f"own{number}", *SMALL, *SPARSE, "--prompt", "a cat", *flags)
        torch.testing.assert_close(made[number], alone, rtol=1e-5, atol=1e-5)
    assert len({tuple(latents.flatten()[:8].tolist()) for latents in made}) == 4
    told = [video["made"]["lora"] for video in json.loads((tmp_path / "all.json").read_text())["videos"]]
    assert told[1] == [{"source": second, "scale": 1}, {"source": first, "scale": -0.5}]
    assert told[2] == []
    places = ["--output", str(tmp_path / "ring.mp4"), "--output-latents", str(tmp_path / "ring.pt")]
    run_ranks(2, _rank_generates, [*SMALL, *SPARSE, *file, "--ring-degree", "2", *places])
    for number, latents in enumerate(made):
        got = torch.load(tmp_path / f"ring_{number}.pt", weights_only=True)
        torch.testing.assert_close(got, latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "text"),
    [([], "has differences .*give it to all by --lora"), (["--compile"], "--compile would compile the blocks anew")],
)
def test_lines_whose_lora_weights_cannot_change_are_refused(
    flags: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "lora": _distilled(tmp_path / "lora.safetensors")}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = ["--prompt-file", str(tmp_path / "lines.jsonl"), "--output", str(tmp_path / "video.mp4")]
    assert main([*SMALL, *file, *flags]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_a_source_that_is_not_beside_the_weights_cannot_be_switched(tmp_path: Path) -> None:
    first, second = (_one_layer(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    pipe = _loaded("--lora", first)
    with pytest.raises(ValueError, match=f"lora {second} is not beside the weights of the transformer"):
        use_lora(pipe, parse_arguments(["--lora", second]))


def test_lines_may_share_differences(tmp_path: Path) -> None:
    source = _distilled(tmp_path / "lora.safetensors")
    lines = [{"prompt": text, "lora": source, "lora_scale": 0.1} for text in ("a", "b")]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = _latents(tmp_path, "all", *SMALL, "--prompt-file", str(tmp_path / "lines.jsonl"))
    (alone,) = _latents(tmp_path, "own", *SMALL, "--prompt", "b", "--lora", source, "--lora-scale", "0.1")
    torch.testing.assert_close(made[1], alone, rtol=1e-5, atol=1e-5)
