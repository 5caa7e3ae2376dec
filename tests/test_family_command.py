"""Wan 2.1 and video-to-video by `generate` and the server: what they start from, their defaults, what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")

from sp_sparse.generate import defaults
from sp_sparse.generate import job as generate_job
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.asked import fill_defaults
from sp_sparse.generate.defaults import VideoDefaults
from sp_sparse.generate.files import save_video
from sp_sparse.generate.models import find_model
from sp_sparse.generate.random_models import (
    tiny_image_to_video,
    tiny_text_image_to_video,
    tiny_text_to_video,
    tiny_wan_2_1,
    tiny_wan_2_1_image,
)
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.sources import look_at_clip, read_clip
from sp_sparse.serve.arguments import parse_serve_arguments
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.requests import VideoRequest, job_parameters
from sp_sparse.serve.wan import WanBackend
from tests.ranks import run_ranks
from tests.wan_family import family_pipeline

CPU = torch.device("cpu")
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.5"]
SMALL = ["--height", "64", "--width", "64", "--num-frames", "5"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """15 frames of 96 x 64 pixels at 12 a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rows, columns = np.mgrid[0:64, 0:96]
    frames = [np.stack([rows * 4, columns * 2, np.full_like(rows, 16 * n)], -1) for n in range(15)]
    save_video(torch.from_numpy(np.stack(frames)).float() / 255, path, 12)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = {name: str(folder / f"{name}.png") for name in ("first", "other")}
    for seed, path in enumerate(paths.values()):
        noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(path)
    return paths


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved pipelines; all but `flf` without their weights."""
    root = tmp_path_factory.mktemp("models")
    pipes = {
        "t2v-a14b": tiny_text_to_video(torch.float32),
        "i2v-a14b": tiny_image_to_video(torch.float32),
        "ti2v": tiny_text_image_to_video(torch.float32, from_image=False),
        "t2v": tiny_wan_2_1(torch.float32),
        "i2v": tiny_wan_2_1_image(torch.float32),
        "vace": family_pipeline("vace"),
        "animate": family_pipeline("animate"),
        "flf": tiny_wan_2_1_image(torch.float32, last_image=True),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
        if name != "flf":
            for weights in (root / name).rglob("*.safetensors"):
                weights.unlink()
    return {name: str(root / name) for name in pipes}


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def _latents(folder: Path, *flags: str, degree: str | None = None) -> Tensor:
    """On one rank, or on two; the report lies beside the video."""
    asked = [*flags, *SPARSE, "--output", str(folder / "video.mp4"), "--output-latents", str(folder / "video.pt")]
    if degree is None:
        assert main(asked) == 0
    else:
        run_ranks(2, _rank_generates, [*asked, f"--{degree}-degree=2"])
    latents: Tensor = torch.load(folder / "video.pt", weights_only=True)
    return latents


def _made(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / "video.json").read_text())["videos"][0]["made"]
    return made


def test_a_video_is_made_into_another(clip: str, tmp_path: Path) -> None:
    flags = ["--model=tiny-2.1", "--video", clip, *SMALL, "--num-inference-steps=5"]
    one = _latents(tmp_path, *flags, "--strength=0.6")
    made = _made(tmp_path)
    assert (made["num_inference_steps"], made["strength"]) == (3, 0.6)
    assert made["video"] == {"path": clip, "width": 96, "height": 64, "cropped_share": pytest.approx(1 / 3)}
    densities = json.loads((tmp_path / "video.json").read_text())["attention"]["densities"]
    # Conservative: of 3 steps that run the first is dense, and so is layer 0.
    assert [(row["step"], row["dense_calls"] > 0) for row in densities if row["layer"] == 1] == [
        (0, True),
        (1, False),
        (2, False),
    ]
    for degree in ("ring", "cfg-parallel"):
        again = _latents(tmp_path, *flags, "--strength=0.6", degree=degree)
        torch.testing.assert_close(again, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_latents(tmp_path, *flags, "--strength=0.2"), one, atol=1e-2)


def test_what_is_left_open_follows_the_video(clip: str) -> None:
    def filled(*flags: str) -> tuple[Any, ...]:
        arguments = parse_arguments(["--model=tiny-2.1", "--video", clip, *flags])
        own = fill_defaults(arguments, find_model(arguments, CPU))
        return own.num_frames, own.fps, own.height, own.width, own.strength

    # 13 of 15 frames at the clip's own pace, in its aspect: sqrt(128 * 128 * 96 / 64) rounds to 157, of which 144 fits.
    assert filled() == (13, 12, 96, 144, 0.8)
    assert filled("--num-frames=5", "--fps=8", "--height=64", "--strength=1") == (5, 8, 64, 96, 1.0)


def test_a_clip_is_read_no_further_than_needed(clip: str) -> None:
    assert (look_at_clip(clip, 9).frames, look_at_clip(clip, 100).frames) == (9, 15)
    first, last = read_clip(clip, 15)[::14]
    assert first.size == (96, 64)
    # The codec is lossy; blue grows by 16 a frame.
    assert abs(first.getpixel((48, 32))[2] - 0) < 24
    assert abs(last.getpixel((48, 32))[2] - 224) < 24


def test_a_video_between_two_images(folders: dict[str, str], pictures: dict[str, str], tmp_path: Path) -> None:
    for model in (folders["flf"], "tiny-i2v"):
        flags = ["--model", model, *SMALL, "--num-inference-steps=2", "--image", pictures["first"]]
        if model == "tiny-i2v":
            without = _latents(tmp_path, *flags)
        flags += ["--guidance-scale=3", "--sparse-attn-block-size=16"]
        one = _latents(tmp_path, *flags, "--last-image", pictures["other"])
        assert _made(tmp_path)["last_image"]["path"] == pictures["other"]
        assert not torch.allclose(_latents(tmp_path, *flags, "--last-image", pictures["first"]), one, atol=1e-4)
        again = _latents(tmp_path, *flags, "--last-image", pictures["other"], degree="ulysses")
        torch.testing.assert_close(again, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, one, atol=1e-4)


def test_a_video_is_controlled(clip: str, pictures: dict[str, str], tmp_path: Path) -> None:
    Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, 0)).resize((64, 64)).save(tmp_path / "mask.png")
    base = ["--model=tiny-vace", *SMALL, "--num-inference-steps=2"]
    images = [f"--reference-image={picture}" for picture in pictures.values()]
    flags = [*base, "--video", clip, f"--mask={tmp_path / 'mask.png'}", *images, "--conditioning-scale=0.7"]
    one = _latents(tmp_path, *flags)
    assert one.shape[2] == 2, "reference images are no frames of the video"
    made = _made(tmp_path)
    assert (made["num_frames"], made["fps"], made["conditioning_scale"]) == (5, 12, 0.7)
    assert (made["video"]["path"], made["mask"]["width"]) == (clip, 64)
    assert made["reference_image"] == list(pictures.values())
    attention = json.loads((tmp_path / "video.json").read_text())["attention"]
    # Conservative: of two steps and three layers the second step and two layers are sparse, and a control block.
    assert attention["calls"] == {"dense": 14, "reference": 6}
    torch.testing.assert_close(_latents(tmp_path, *flags, degree="ring"), one, rtol=1e-4, atol=1e-4)
    for name in ("--mask", "--reference-image", "--conditioning-scale"):
        less = [flag for flag in flags if not flag.startswith(name)]
        assert not torch.allclose(_latents(tmp_path, *less), one, atol=1e-3), name


def test_each_line_of_a_file_starts_from_its_own(clip: str, pictures: dict[str, str], tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "video": clip, "strength": 0.5, "num_frames": 9},
        {"prompt": "b", "video": clip, "num_frames": 5},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    output = ["--output", str(tmp_path / "video.mp4")]
    assert main(["--model=tiny-2.1", "--prompt-file", str(file), "--num-inference-steps=2", *SMALL, *output]) == 0
    made = [video["made"] for video in json.loads((tmp_path / "video.json").read_text())["videos"]]
    assert [(m["strength"], m["num_inference_steps"], m["num_frames"]) for m in made] == [(0.5, 1, 9), (0.8, 1, 5)]
    lines = [{"prompt": "a", "image": pictures["first"], "last_image": pictures[name]} for name in ("first", "other")]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["--model=tiny-i2v", "--prompt-file", str(file), "--num-inference-steps=1", *SMALL, *output]) == 0
    made = [video["made"] for video in json.loads((tmp_path / "video.json").read_text())["videos"]]
    assert [m["last_image"]["path"] for m in made] == [pictures["first"], pictures["other"]]


def test_every_model_has_its_authors_defaults(folders: dict[str, str]) -> None:
    found = {
        name: find_model(parse_arguments(["--model", path]), CPU).defaults
        for name, path in folders.items()
        if name != "animate"
    }
    assert found == {
        "t2v-a14b": VideoDefaults(480, 832, 81, 16, 40, 4.0),
        "i2v-a14b": VideoDefaults(480, 832, 81, 16, 40, 3.5),
        "ti2v": VideoDefaults(704, 1280, 121, 24, 50, 5.0),
        "t2v": VideoDefaults(480, 832, 81, 16, 50, 5.0),
        "i2v": VideoDefaults(480, 832, 81, 16, 40, 5.0),
        "vace": VideoDefaults(480, 832, 81, 16, 50, 5.0),
        "flf": VideoDefaults(720, 1280, 81, 16, 50, 5.0),
    }
    assert found["i2v"] == defaults.I2V_2_1


def _refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    def load(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(generate_job, "load_pipeline", load)
    assert main(list(flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model=animate"], r"a WanAnimatePipeline, whose inputs have no flags.*enable_sparse_attention\(pipe"),
        (["--model=flf", "--image=FIRST"], "between two images; give the last frame with --last-image"),
        (["--model=flf"], "makes videos from an image; give its first frame with --image"),
        (["--model=i2v", "--image=FIRST", "--last-image=FIRST"], "from its first frame alone; leave --last-image out"),
        (["--model=ti2v", "--image=FIRST", "--last-image=FIRST"], "from its first frame alone; leave --last-image out"),
        (["--model=i2v-a14b", "--image=FIRST", f"--last-image={__file__}"], "--last-image .* give a PNG, JPEG or WebP"),
        (["--model=i2v-a14b", "--image=FIRST", "--last-image=no.png"], "--last-image no.png is not a file"),
        (["--model=i2v-a14b", "--last-image=FIRST"], "--last-image is given without --image; give the first frame"),
        (["--model=t2v", "--image=FIRST"], "makes videos from text alone; leave --image out"),
        (["--model=t2v", "--image=FIRST", "--video=CLIP"], "--video and --image are both given.*use one"),
        (["--model=t2v", "--strength=0.5"], "--strength 0.5 is for --video, which is not given; leave"),
        (["--model=t2v", "--video=CLIP", "--strength=0"], r"--strength 0.0 is outside \(0, 1\]"),
        (["--model=t2v", "--video=CLIP", "--strength=0.01"], "none of --num-inference-steps 50; use 0.02 or more"),
        (["--model=t2v", "--video=CLIP", "--num-frames=17"], "above the 15 frames of --video .*; use 13 or fewer"),
        (["--model=t2v", "--video=no.mp4"], "--video no.mp4 is not a file; give a video"),
        (["--model=t2v", f"--video={__file__}"], "--video .* cannot be read .*; give an mp4, WebM or GIF"),
        (["--model=t2v-a14b", "--video=CLIP"], "two experts, and that loop runs the first alone; use a Wan 2.1 text"),
        (["--model=ti2v", "--video=CLIP"], "its VAE shrinks pictures by another factor than 8; use a Wan 2.1"),
        (["--model=i2v", "--video=CLIP"], "makes videos from an image; give its first frame"),
        (["--model=a14b-random", "--video=CLIP"], "two experts, and that loop"),
        (["--model=vace", "--image=FIRST"], "is VACE; give what it shows with --reference-image"),
        (
            ["--model=vace", "--video=CLIP", "--strength=0.5"],
            "--strength 0.5 is for video-to-video, .*leave --strength",
        ),
        (["--model=vace", "--mask=FIRST"], "--mask is for --video, which is not given; give it, or leave --mask out"),
        (["--model=vace", "--video=CLIP", f"--mask={__file__}"], "--mask .* cannot be read .*; give an mp4"),
        (
            ["--model=vace", f"--reference-image=FIRST,{__file__}"],
            "--reference-image .*py cannot be read .*; give a PNG",
        ),
        (["--model=vace", "--reference-image=FIRST", "--num-frames=509"], "--num-frames 509 is above the 505"),
        (["--model=vace", "--conditioning-scale=11"], "--conditioning-scale 11.0 is above 10"),
        (
            ["--model=t2v", "--video=CLIP", "--mask=FIRST"],
            "--mask is for VACE, which .* is not; leave --mask out, or use",
        ),
        (["--model=t2v", "--reference-image=FIRST"], "--reference-image is for VACE, which .* is not; leave"),
        (["--model=t2v", "--conditioning-scale=1"], "--conditioning-scale is for VACE, which .* is not; leave"),
        (["--model=tiny", "--video=CLIP"], "a Wan 2.1 text-to-video model, such as tiny-2.1, or leave --video out"),
    ],
)
def test_refused_before_weights_are_read(
    flags: list[str],
    text: str,
    folders: dict[str, str],
    pictures: dict[str, str],
    clip: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = flags[0].removeprefix("--model=")
    own = [flag.replace("=FIRST", f"={pictures['first']}").replace("=CLIP", f"={clip}") for flag in flags[1:]]
    told = _refused(
        capsys, monkeypatch, "--model", folders.get(model, model), *own, "--output", str(tmp_path / "video.mp4")
    )
    assert re.search(text, told), told


def test_lines_with_and_without_a_video_need_two_files(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "a", "video": clip}) + "\n" + json.dumps({"prompt": "b"}))
    told = _refused(capsys, monkeypatch, "--model=tiny-2.1", "--prompt-file", str(file))
    assert re.search(r"line 1 starts from a video, .*line 2 from text alone; put them into two files", told)


def test_a_folder_of_video_to_video_is_a_text_to_video_model(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["t2v"], tmp_path / "v2v")
    index = json.loads((tmp_path / "v2v" / "model_index.json").read_text())
    (tmp_path / "v2v" / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanVideoToVideoPipeline"}))
    assert find_model(parse_arguments(["--model", str(tmp_path / "v2v")]), CPU).defaults == defaults.T2V_2_1


def test_the_server_makes_videos_of_wan_2_1(folders: dict[str, str], pictures: dict[str, str], tmp_path: Path) -> None:
    flags = ["--model=tiny-2.1-i2v", "--device=cpu", *SPARSE]
    backend = WanBackend(parse_serve_arguments(flags), Ranks(0, 1, CPU))
    backend.load()
    asked = {"prompt": "a cat", "size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 3}
    job = job_parameters(VideoRequest.model_validate(asked), None, backend.card, Limits())
    stream = io.BytesIO()
    Image.open(pictures["first"]).save(stream, "PNG")
    job = replace(job, image=stream.getvalue())
    latents = backend.denoise(job, backend.encode(job), lambda: None)
    own = ["--prompt=a cat", *SMALL, "--num-inference-steps=2", "--seed=3", "--image", pictures["first"]]
    torch.testing.assert_close(latents, _latents(tmp_path, flags[0], *own), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"between two images, and a request has one; .*sp_sparse.generate --image"):
        WanBackend(parse_serve_arguments(["--model", folders["flf"], "--device=cpu"]), Ranks(0, 1, CPU))
    with pytest.raises(ValueError, match=r"is VACE, and a request has neither .*sp_sparse\.generate"):
        WanBackend(parse_serve_arguments(["--model=tiny-vace", "--device=cpu"]), Ranks(0, 1, CPU))


def test_lines_of_vace_have_their_own_images(
    pictures: dict[str, str],
    clip: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "lines.jsonl"
    lines = [{"prompt": "a", "reference_image": [pictures["first"]]}, {"prompt": "b", "video": clip}]
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model=tiny-vace", "--prompt-file", str(file), "--num-inference-steps=1", *SMALL]
    assert main([*flags, "--output", str(tmp_path / "video.mp4")]) == 0
    made = [video["made"] for video in json.loads((tmp_path / "video.json").read_text())["videos"]]
    assert [(m["reference_image"], m["video"] is None) for m in made] == [([pictures["first"]], True), ([], False)]
    file.write_text(json.dumps({"prompt": "a", "reference_image": pictures["first"]}))
    assert "line 1: reference_image" in (told := _refused(capsys, monkeypatch, *flags))
    assert 'is not a list of texts; write ["cat.png"]' in told
