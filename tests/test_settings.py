"""Settings of `generate` and the server are taken as asked, or refused by name before weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sp_sparse.flags import flag_of, options_of
from sp_sparse.generate import job as generate_job
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import TINY_MODELS, GenerateArguments, parse_arguments
from sp_sparse.generate.models import WanModel, find_model, shift_of, transformers_of
from sp_sparse.generate.random_models import tiny_image_to_video, tiny_text_image_to_video, tiny_text_to_video
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.start import cropped_share, fill_frame
from sp_sparse.serve.answers import ApiError
from sp_sparse.serve.arguments import ServeArguments, parse_serve_arguments
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.requests import VideoRequest, job_parameters
from sp_sparse.serve.wan import WanBackend
from tests.serving.fake import CARD

TINY = ["--model", "tiny"]
SMALL = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "2"]
CPU = torch.device("cpu")
SPARSE = ["--sparse-attn-backend", "reference"]
TABLE = [*SPARSE, "--sparse-attn-schedule", "table", "--sparse-attn-schedule-table", "1,0.5"]


def _refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    """What is said, before anything is loaded."""

    def load(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(generate_job, "load_pipeline", load)
    assert main([*TINY, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def _generate(folder: Path, *flags: str) -> dict[str, Any]:
    """The report."""
    assert main([*TINY, *flags, "--output", str(folder / "video.mp4")]) == 0
    report: dict[str, Any] = json.loads((folder / "video.json").read_text())
    return report


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of each topology, without their weights."""
    root = tmp_path_factory.mktemp("models")
    tiny_text_to_video(torch.float32).save_pretrained(root / "t2v")
    tiny_image_to_video(torch.float32).save_pretrained(root / "i2v")
    tiny_text_image_to_video(torch.float32, from_image=False).save_pretrained(root / "ti2v")
    for weights in root.rglob("*.safetensors"):
        weights.unlink()
    return {path.name: path for path in root.iterdir()}


def _changed(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a model's folder with other values in one of its configurations."""
    if not copy.exists():
        shutil.copytree(folder, copy)
    config = json.loads((copy / file).read_text()) | values
    (copy / file).write_text(json.dumps(config))
    return copy


def _found(model: Path | str, *flags: str) -> WanModel:
    return find_model(parse_arguments(["--model", str(model), *flags]), CPU)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num-frames", "18"], "--num-frames 18: frames are 4n . 1; use 17 or 21"),
        (["--num-frames", "16"], "use 13 or 17"),
        (["--num-frames", "7"], "use 5 or 9"),
        (["--num-frames", "2"], "use 1 or 5"),
        (["--height", "200"], "--height 200: heights and widths are multiples of 16; use 192 or 208"),
        (["--width", "136"], "--width 136: .* use 128 or 144"),
        (["--width", "7"], "--width 7: .* use 16$"),
        (["--model", "tiny-ti2v", "--height", "208"], "multiples of 32; use 192 or 224"),
        (["--height", "4096"], "--height 4096 is above the 2048"),
        (["--num-frames", "513"], "--num-frames 513 is above the 509"),
        (["--guidance-scale", "1", "--guidance-scale-2", "3"], "--guidance-scale 1 switches guidance off"),
        (
            ["--model", "tiny-ti2v", "--guidance-scale-2", "3"],
            "tiny-ti2v has no second expert; leave --guidance-scale-2",
        ),
        (
            ["--model", "tiny-ti2v", "--sparse-attn-backend", "auto", "--sparse-attn-topk-2", "0.2"],
            "use --sparse-attn-topk$",
        ),
        (["--sparse-attn-topk", "0.2"], "add --sparse-attn-backend auto"),
        (["--layers", "8"], "--layers 8 is for a14b-random"),
        (["--layers", "4"], "--layers 4 is for a14b-random and ti2v-5b-random"),
        (["--full"], "--full is for a14b-random and ti2v-5b-random, and the model is tiny; leave it out"),
        (
            ["--guidance-scale", "1", "--negative-prompt", "grey"],
            "--negative-prompt is given, but --guidance-scale 1 switches guidance off.*leave --negative-prompt out",
        ),
        ([*TABLE, "--sparse-attn-topk", "0.3"], "topk=0.3 changes nothing beside a schedule table.*; leave topk out"),
        ([*TABLE, "--sparse-attn-topk-2", "0.2"], "topk_2=0.2 changes nothing beside a schedule table"),
        (
            [
                *SPARSE,
                "--sparse-attn-schedule-2=table",
                "--sparse-attn-schedule-table-2=0.5",
                "--sparse-attn-topk-2=0.2",
            ],
            "topk_2=0.2 changes nothing",
        ),
        (
            [*SPARSE, "--sparse-attn-selector", "window", "--sparse-attn-topk", "0.2"],
            "topk=0.2 changes nothing with selector 'window'.*leave topk out",
        ),
        (
            [*SPARSE, "--sparse-attn-kv-exchange", "all_gather"],
            "all_gather is for ring ranks, and --ring-degree is 1; leave it out",
        ),
        (
            ["--sparse-attn-backend", "tests.test_remainder:NoLse", "--sparse-attn-remainder", "mean"],
            "returns no LSE, which remainder='mean' needs to be merged; use .*, or remainder='drop'$",
        ),
        (["--lora", "/nowhere/x.safetensors"], "--lora /nowhere/x.safetensors is no file.*give a .safetensors file"),
        (["--lora", "/nowhere/x"], "is no file, no folder and no hub id"),
        (["--lora", "tests/x.safetensors"], "is no file"),
        (["--lora-2", f"{Path(__file__).parent}"], "has no weights in it"),
        (["--lora", ""], "--lora '' is no"),
    ],
)
def test_refused_before_weights_are_read(
    flags: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(text, _refused(capsys, monkeypatch, *flags))


@pytest.mark.parametrize(
    "flags",
    [
        [*TABLE, "--sparse-attn-schedule-2", "constant", "--sparse-attn-topk", "0.3"],  # the second expert reads it
        [*TABLE, "--sparse-attn-schedule-2", "constant", "--sparse-attn-topk-2", "0.3"],
        [*SPARSE, "--sparse-attn-selector", "window", "--sparse-attn-topk", "1"],  # dense
        ["--guidance-scale", "2", "--negative-prompt", "grey"],
        [*SPARSE, "--sparse-attn-kv-exchange", "all_gather", "--ring-degree", "2"],
        ["--model", "a14b-random", "--layers", "4"],
        ["--model", "ti2v-5b-random", "--layers", "30", "--full"],
    ],
)
def test_what_something_reads_is_taken(flags: list[str]) -> None:
    parse_arguments(flags)


NUMBERS = [
    (kind, option)
    for kind in (GenerateArguments, ServeArguments)
    for option in options_of(kind)
    if option.metadata["parse"] in (int, float)
]


@pytest.mark.parametrize(("kind", "option"), NUMBERS, ids=lambda value: getattr(value, "name", ""))
def test_every_number_is_refused_by_its_name(kind: type[Any], option: Any) -> None:
    parse = parse_arguments if kind is GenerateArguments else parse_serve_arguments
    flag, whole = flag_of(option.name), option.metadata["parse"] is int
    huge = str(10**30) if whole else "1e300"
    for value in ("nan", "inf", "-inf", huge, f"-{huge}", *(["1.5"] if whole else [])):
        with pytest.raises(ValueError, match=flag):
            parse([f"{flag}={value}"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("flow-shift", "0"),
        ("flow-shift", "-1"),
        ("guidance-scale", "0"),
        ("guidance-scale", "-3"),
        ("guidance-scale-2", "-1"),
        ("timeout-s", "0"),
        ("verify-tolerance", "-1e-9"),
        ("fps", "0"),
        ("fps", "121"),
        ("num-inference-steps", "0"),
        ("num-frames", "0"),
        ("height", "-16"),
        ("repeat", "0"),
        ("layers", "0"),
        ("seed", "-1"),
        ("seed", str(2**64)),
        ("cfg-parallel-degree", "3"),
        ("sparse-attn-topk", "nan"),
        ("sparse-attn-topk-2", "0"),
        ("sparse-attn-window", "-1"),
    ],
)
def test_out_of_bounds_says_what_is_allowed(flag: str, value: str, tmp_path: Path) -> None:
    name = flag.removeprefix("sparse-attn-").replace("-", "_") if flag.startswith("sparse") else f"--{flag}"
    needed = "sparse_attn_backend: auto\n" if flag.startswith("sparse") else ""
    (tmp_path / "job.yaml").write_text(f"{needed}{flag}: {'.nan' if value == 'nan' else value}\n")
    with pytest.raises(ValueError, match=rf"{name} .*; give a (whole )?number (from|above) "):
        parse_arguments(["--config", str(tmp_path / "job.yaml")])


def test_the_largest_seed_makes_a_video(tmp_path: Path) -> None:
    assert _generate(tmp_path, *SMALL, "--seed", str(2**64 - 1))["videos"][0]["made"]["seed"] == 2**64 - 1


@pytest.mark.parametrize("model", TINY_MODELS)
def test_what_is_known_of_the_tiny_models_is_so(model: str) -> None:
    known = _found(model)
    pipe = known.load(CPU, torch.float32, None)
    config = pipe.transformer.config
    assert known.experts == len(transformers_of(pipe))
    assert known.spatial_multiple == pipe.vae_scale_factor_spatial * config.patch_size[1]
    assert known.temporal_multiple == pipe.vae_scale_factor_temporal
    assert known.positions == config.rope_max_seq_len
    assert known.takes_flow_shift == (shift_of(pipe.scheduler) is not None)


def test_a_folder_is_known_by_its_configurations(folders: dict[str, Path], tmp_path: Path) -> None:
    facts = {name: _found(path) for name, path in folders.items()}
    assert {name: model.spatial_multiple for name, model in facts.items()} == {"t2v": 16, "i2v": 16, "ti2v": 32}
    assert {name: model.experts for name, model in facts.items()} == {"t2v": 2, "i2v": 2, "ti2v": 1}
    assert {name: model.temporal_multiple for name, model in facts.items()} == {"t2v": 4, "i2v": 4, "ti2v": 4}
    assert {model.positions for model in facts.values()} == {128}
    one = _changed(
        folders["t2v"], tmp_path / "wan21", "model_index.json", transformer_2=[None, None], boundary_ratio=None
    )
    assert _found(one).experts == 1
    other = _changed(
        folders["t2v"], tmp_path / "other", "vae/config.json", scale_factor_spatial=16, scale_factor_temporal=8
    )
    assert (_found(other).spatial_multiple, _found(other).temporal_multiple) == (32, 8)
    patched = _changed(other, tmp_path / "other", "transformer/config.json", patch_size=[1, 4, 4])
    assert _found(patched).spatial_multiple == 64


@pytest.mark.parametrize(
    ("file", "values", "flags", "text"),
    [
        (
            "model_index.json",
            {"transformer_2": [None, None], "boundary_ratio": None},
            ["--guidance-scale-2", "3"],
            "has no second expert",
        ),
        ("vae/config.json", {"scale_factor_spatial": 16}, ["--width", "208"], "multiples of 32; use 192 or 224"),
        ("vae/config.json", {"scale_factor_temporal": 8}, ["--num-frames", "21"], "frames are 8n . 1; use 17 or 25"),
        (
            "scheduler/scheduler_config.json",
            {"use_flow_sigmas": False},
            ["--flow-shift", "3"],
            "leave --flow-shift out",
        ),
    ],
)
def test_what_a_folder_cannot_make_is_refused(
    folders: dict[str, Path],
    file: str,
    values: dict[str, Any],
    flags: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = _changed(folders["t2v"], tmp_path / "model", file, **values)
    output = str(tmp_path / "video.mp4")
    size = ["--height", "128", "--width", "128", "--num-frames", "17"]
    assert re.search(text, _refused(capsys, monkeypatch, "--model", str(model), *size, *flags, "--output", output))


@pytest.mark.parametrize("values", [{"transformer_2": [None, None]}, {"boundary_ratio": None}])
def test_half_a_second_expert_is_refused(folders: dict[str, Path], values: dict[str, Any], tmp_path: Path) -> None:
    model = _changed(folders["t2v"], tmp_path / "model", "model_index.json", **values)
    with pytest.raises(ValueError, match="give a folder with both, or with neither"):
        _found(model)


@pytest.mark.parametrize("missing", ["vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_without_a_configuration(
    folders: dict[str, Path],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders["t2v"], model)
    (model / missing).unlink()
    assert f"{missing} of {model} cannot be read" in _refused(capsys, monkeypatch, "--model", str(model))


def test_the_report_tells_what_was_made(tmp_path: Path) -> None:
    flags = ["--height=96", "--width=64", "--num-frames=5", "--num-inference-steps=3", "--guidance-scale=2"]
    report = _generate(tmp_path, *flags, "--guidance-scale-2=3", "--flow-shift=7", "--fps=12", "--seed=9")
    made: dict[str, Any] = {"height": 96, "width": 64, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    made |= {"negative_prompt": "", "boundary_ratio": 0.875, "scheduler": "UniPCMultistepScheduler"}
    made |= {"guidance_scale_2": 3.0, "flow_shift": 7.0, "fps": 12, "seed": 9, "lora": [], "lora_2": []}
    made |= dict.fromkeys(("image", "last_image", "video", "mask", "strength", "conditioning_scale"))
    made["reference_image"] = []
    assert report["videos"][0]["made"] == made


def test_the_report_tells_the_models_own_values(tmp_path: Path) -> None:
    made = _generate(tmp_path, "--model", "tiny-ti2v", "--num-inference-steps", "1")["videos"][0]["made"]
    assert (made["height"], made["width"], made["num_frames"], made["fps"]) == (192, 192, 17, 8)
    assert (made["guidance_scale"], made["guidance_scale_2"], made["flow_shift"]) == (3.0, None, 3.0)
    assert _generate(tmp_path, *SMALL)["videos"][0]["made"]["guidance_scale_2"] == 3.0


def _lora(path: Path, block: int, seed: int, prefix: str = "diffusion_model.", width: int = 128) -> str:
    generator = torch.Generator().manual_seed(seed)
    key = f"{prefix}blocks.{block}.self_attn.q.lora_"
    down, up = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
    save_file({f"{key}down.weight": down, f"{key}up.weight": up}, path)
    return str(path)


def test_lora_weights_that_fit_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = {"foo.bar.lora_A.weight": torch.ones(4, 128), "foo.bar.lora_B.weight": torch.ones(128, 4)}
    save_file(foreign, tmp_path / "foreign.safetensors")
    (tmp_path / "garbage.safetensors").write_text("no tensors")
    _lora(tmp_path / "absent.safetensors", block=7, seed=0)
    _lora(tmp_path / "narrow.safetensors", block=1, seed=0, width=64)
    save_file({}, tmp_path / "empty.safetensors")
    for name in ("foreign", "garbage", "absent", "narrow", "empty"):
        for flag in ("--lora", "--lora-2"):
            source = str(tmp_path / f"{name}.safetensors")
            assert main([*TINY, *SMALL, flag, source, "--output", str(tmp_path / "video.mp4")]) == 2
            error = capsys.readouterr().err
            assert f"error: {flag} {source}" in error
            assert "give LoRA weights that were made for this model" in error
            assert "step" not in error
    assert not (tmp_path / "video.mp4").exists()


_FITS = "transformer.blocks.1.attn1.to_q"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ([f"{_FITS}.lora_A", f"{_FITS}.lora_B", "transformer.blocks.7.attn1.to_q.lora_A"], "3 weights, of which 2 fit"),
        (
            [f"{_FITS}.lora.down", f"{_FITS}.lora.up", "other.proj.lora.down"],
            "of which 2 fit .* and not other.proj.lora.down",
        ),
        ([f"{_FITS}.lora_A", f"{_FITS}.lora_B", "transformer.blocks.0.ffn.net.2.lora_B"], "and not .*ffn.net.2.lora_B"),
        (
            [f"{_FITS}.lora_A", f"{_FITS}.lora_B", *(f"transformer.blocks.{n}.attn1.to_q.lora_A" for n in range(4, 8))],
            "6 weights, of which 2 fit .* and not (.*lora_A.weight, ){3}…; give LoRA weights",
        ),
    ],
)
@pytest.mark.parametrize(("flag", "part"), [("--lora", "transformer"), ("--lora-2", "transformer_2")])
def test_lora_weights_that_fit_in_part_are_refused(
    flag: str, part: str, keys: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "partly.safetensors")
    generator = torch.Generator().manual_seed(0)
    shapes = {key: (4, 128) if key.endswith(("_A", "down")) else (128, 4) for key in keys}
    save_file({f"{key}.weight": torch.randn(*shape, generator=generator) for key, shape in shapes.items()}, source)
    assert main([*TINY, *SMALL, flag, source, "--output", str(tmp_path / "video.mp4")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith(f"error: {flag} {source} has {len(keys)} weights")
    assert re.search(text, line)
    assert f"the {part} of tiny" in line
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_lora_weights_of_every_layer_are_taken(names: tuple[str, str], tmp_path: Path) -> None:
    pipe = tiny_text_to_video(torch.float32)
    layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    weights: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if "attn" in name or "ffn" in name:
            down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
            weights |= {f"transformer.{name}.{k}.weight": x for k, x in zip(names, (down, up), strict=True)}
    save_file(weights, tmp_path / "whole.safetensors")
    for flag in ("--lora", "--lora-2"):
        _generate(tmp_path, *SMALL, flag, str(tmp_path / "whole.safetensors"))


def test_several_lora_weights_all_count(tmp_path: Path) -> None:
    first = _lora(tmp_path / "first.safetensors", block=1, seed=1)
    second = _lora(tmp_path / "second.safetensors", block=1, seed=2)
    latents = {}
    for name, flags in {
        "first": ["--lora", first],
        "second": ["--lora", second],
        "again": ["--lora", first, "--lora", second],
        "commas": [f"--lora={first},{second}"],
    }.items():
        path = tmp_path / f"{name}.pt"
        report = _generate(tmp_path, *SMALL, *flags, "--output-latents", str(path))
        assert len(report["arguments"]["lora"]) == (1 if name in ("first", "second") else 2)
        latents[name] = torch.load(path, weights_only=True)
    assert torch.equal(latents["again"], latents["commas"])
    assert not torch.equal(latents["again"], latents["first"])
    assert not torch.equal(latents["again"], latents["second"])
    (tmp_path / "job.yaml").write_text(f"lora: [{first}, {second}]\n")
    assert parse_arguments(["--config", str(tmp_path / "job.yaml")]).lora == (first, second)
    assert parse_serve_arguments(["--lora", first, "--lora", second]).base().lora == (first, second)


def _circle(width: int, height: int) -> Image.Image:
    """A white circle in the middle of a black picture."""
    image = Image.new("RGB", (width, height))
    radius = min(width, height) * 0.4
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    ImageDraw.Draw(image).ellipse(box, fill="white")
    return image


def _extent(image: Image.Image) -> tuple[int, int]:
    """Width and height of what is white."""
    left, top, right, bottom = image.convert("L").point(lambda value: 255 * (value > 127)).getbbox() or (0, 0, 0, 0)
    return right - left, bottom - top


@pytest.mark.parametrize("picture", [(480, 832), (832, 480), (300, 300), (1000, 220)])
@pytest.mark.parametrize("frame", [(128, 128), (96, 160), (160, 96)])
def test_a_circle_stays_one(picture: tuple[int, int], frame: tuple[int, int]) -> None:
    filled = fill_frame(_circle(*picture), *frame)
    assert filled.size == (frame[1], frame[0])
    width, height = _extent(filled)
    smaller, cropped = min(frame), cropped_share(picture, *frame)
    assert abs(width - height) <= 2 or max(width, height) >= smaller  # unless the circle itself is cropped
    assert (cropped < 1e-9) == (picture[0] * frame[0] == picture[1] * frame[1])


def test_the_video_takes_the_aspect_of_its_picture(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _circle(480, 832).save(tmp_path / "portrait.png")
    seen: list[Image.Image] = []
    from diffusers import WanImageToVideoPipeline

    called = WanImageToVideoPipeline.__call__

    def call(pipe: Any, *, image: Image.Image, **given: Any) -> Any:
        seen.append(image)
        return called(pipe, image=image, **given)

    monkeypatch.setattr(WanImageToVideoPipeline, "__call__", call)
    flags = [
        "--model",
        "tiny-i2v",
        "--image",
        str(tmp_path / "portrait.png"),
        "--num-frames=5",
        "--num-inference-steps=1",
    ]
    made = _generate(tmp_path, *flags)["videos"][0]["made"]
    # As Wan chooses: round(sqrt(128 * 128 * 832 / 480)) // 16 * 16.
    assert (made["height"], made["width"]) == (160, 96)
    assert (made["image"]["width"], made["image"]["height"]) == (480, 832)
    assert made["image"]["cropped_share"] == pytest.approx(1 - (480 / 832) / (96 / 160), abs=1e-9)
    assert "image: 480x832 fills 96x160; 3.8% of it is cropped" in capsys.readouterr().err
    made = _generate(tmp_path, *flags, "--height=64", "--width=128")["videos"][0]["made"]
    assert (made["height"], made["width"]) == (64, 128)
    made = _generate(tmp_path, *flags, "--width=96")["videos"][0]["made"]
    assert (made["height"], made["width"]) == (160, 96)
    assert [image.size for image in seen] == [(96, 160), (128, 64), (96, 160)]
    width, height = _extent(seen[0])
    assert abs(width - height) <= 1


def test_a_photo_is_turned_as_it_is_meant(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    _circle(160, 96).save(tmp_path / "photo.jpg", exif=exif)
    flags = ["--model", "tiny-i2v", "--image", str(tmp_path / "photo.jpg"), "--num-frames=5", "--num-inference-steps=1"]
    made = _generate(tmp_path, *flags)["videos"][0]["made"]
    assert made["height"] > made["width"]
    assert (made["image"]["width"], made["image"]["height"]) == (96, 160)


def test_what_is_no_picture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "tiny-i2v", "--image", __file__, "--output", str(tmp_path / "video.mp4")]
    assert "give a PNG, JPEG or WebP picture" in _refused(capsys, monkeypatch, *flags)
    assert "give a PNG, JPEG or WebP picture" in _refused(capsys, monkeypatch, *flags, *SMALL)
    cut = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    assert f"--image {cut} cannot be read" in _refused(capsys, monkeypatch, *flags, *SMALL, "--image", str(cut))


def _request(**asked: Any) -> VideoRequest:
    return VideoRequest.model_validate({"prompt": "a cat", **asked})


def test_the_server_takes_the_aspect_too() -> None:
    def size(**asked: Any) -> tuple[int, int]:
        job = job_parameters(_request(**asked), (480, 832), CARD, Limits())
        return job.width, job.height

    assert size() == (48, 80)  # of 64 x 64 pixels
    assert size(size="64x32") == (64, 32)
    assert size(width=96) == (96, 160)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"size": "64x72"}, "height 72: heights and widths are multiples of 16; use 64 or 80"),
        ({"num_frames": 18}, "num_frames 18: frames are 4n . 1; use 17 or 21"),
        ({"guidance_scale": 1, "guidance_scale_2": 3}, "guidance_scale 1 switches guidance off"),
        ({"guidance_scale": 1, "negative_prompt": "grey"}, "^negative_prompt is given, but guidance_scale 1 switches"),
    ],
)
def test_the_server_refuses_in_the_same_words(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ApiError, match=text):
        job_parameters(_request(**asked), None, CARD, Limits())


@pytest.mark.parametrize("flags", [TABLE, [*SPARSE, "--sparse-attn-selector", "window"]])
def test_a_request_for_a_density_that_nothing_reads_is_refused(flags: list[str]) -> None:
    backend = WanBackend(parse_serve_arguments(["--model", "tiny", "--device", "cpu", *flags]), Ranks(0, 1, CPU))
    size = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2}
    with pytest.raises(ValueError, match=r"topk=0\.2 changes nothing"):
        backend.check(job_parameters(_request(sparse_attn_topk=0.2, **size), None, backend.card, Limits()))
    backend.check(job_parameters(_request(sparse_attn_backend="none", **size), None, backend.card, Limits()))


def test_the_servers_card_is_what_the_folder_says(folders: dict[str, Path], tmp_path: Path) -> None:
    def backend(model: Path) -> WanBackend:
        return WanBackend(parse_serve_arguments(["--model", str(model), "--device=cpu"]), Ranks(0, 1, CPU))

    limits = Limits(frames=1000, pixels=10**9, work=10**18)
    one = _changed(
        folders["t2v"], tmp_path / "wan21", "model_index.json", transformer_2=[None, None], boundary_ratio=None
    )
    card = backend(one).card
    assert (card.two_experts, card.pixel_multiple) == (False, 16)
    with pytest.raises(ApiError, match="wan21 has no second expert; leave guidance_scale_2 out"):
        job_parameters(_request(guidance_scale_2=3), None, card, limits)
    wan = backend(folders["ti2v"])
    assert (wan.card.two_experts, wan.card.pixel_multiple) == (False, 32)
    with pytest.raises(ApiError, match="multiples of 32; use 192 or 224"):
        job_parameters(_request(size="208x208"), None, wan.card, limits)
    with pytest.raises(ValueError, match=r"^num_frames 513 is above the 509"):
        wan.check(job_parameters(_request(num_frames=513), None, wan.card, limits))
