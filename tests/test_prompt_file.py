"""Lines of a JSON prompt file are made as they ask, on every mesh, or refused by file and line before weights are read."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sp_sparse.generate import job as generate_job
from sp_sparse.generate.__main__ import main
from tests.ranks import run_ranks

TINY = ["--model", "tiny"]
SPARSE = [*TINY, "--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.5", "--num-inference-steps", "2"]
LINES: list[dict[str, Any]] = [
    {"prompt": "a cat", "height": 64, "width": 96, "num_frames": 5, "seed": 7},
    {"prompt": "a dog", "negative_prompt": "grey", "height": 128, "num_frames": 9},
]


def _file(folder: Path, *lines: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def _outputs(folder: Path, name: str) -> list[str]:
    return ["--output", str(folder / f"{name}.mp4"), "--output-latents", str(folder / f"{name}.pt")]


def test_every_line_is_made_on_every_mesh(tmp_path: Path) -> None:
    flags = ["--prompt-file", _file(tmp_path, *LINES), *SPARSE, "--width=64", "--seed=3", "--videos-per-prompt=2"]
    assert main([*flags, *_outputs(tmp_path, "one")]) == 0
    videos = json.loads((tmp_path / "one.json").read_text())["videos"]
    keys = ("height", "width", "num_frames", "seed", "negative_prompt")
    told = [(video["prompt"], *(video["made"][key] for key in keys)) for video in videos]
    cat, dog = (64, 96, 5), (128, 64, 9)
    assert told[:2] == [("a cat", *cat, 7, ""), ("a cat", *cat, 8, "")]
    assert told[2:] == [("a dog", *dog, 3, "grey"), ("a dog", *dog, 4, "grey")]
    latents = [torch.load(tmp_path / f"one_{n}.pt", weights_only=True) for n in range(4)]
    # The first and the last as jobs of their own.
    for number, own in ((0, ["--prompt=a cat", "--height=64", "--width=96", "--num-frames=5", "--seed=7"]), (3, [])):
        own = own or ["--prompt=a dog", "--negative-prompt=grey", "--width=64", "--num-frames=9", "--seed=4"]
        assert main([*SPARSE, *own, *_outputs(tmp_path, "own")]) == 0
        assert torch.equal(torch.load(tmp_path / "own.pt", weights_only=True), latents[number])
    for degree in ("ulysses", "ring"):
        run_ranks(2, _rank_generates, [*flags, f"--{degree}-degree=2", *_outputs(tmp_path, degree)])
        for number, wanted in enumerate(latents):
            got = torch.load(tmp_path / f"{degree}_{number}.pt", weights_only=True)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_each_line_starts_from_its_picture(tmp_path: Path) -> None:
    Image.new("RGB", (96, 160), "teal").save(tmp_path / "tall.png")
    Image.new("RGB", (160, 96), "red").save(tmp_path / "wide.png")
    lines = [{"prompt": name, "image": str(tmp_path / f"{name}.png"), "num_frames": 5} for name in ("tall", "wide")]
    flags = ["--model=tiny-i2v", "--prompt-file", _file(tmp_path, *lines), "--num-inference-steps=1"]
    assert main([*flags, "--output", str(tmp_path / "video.mp4")]) == 0
    made = [video["made"] for video in json.loads((tmp_path / "video.json").read_text())["videos"]]
    assert [m["image"]["path"] for m in made] == [line["image"] for line in lines]
    assert made[0]["height"] > made[0]["width"]
    assert made[1]["height"] < made[1]["width"]


@pytest.mark.parametrize(
    ("line", "flags", "text"),
    [
        ("{", [], "is not JSON"),
        ([], [], 'has no "prompt"'),
        ({"seed": 1}, [], 'has no "prompt"'),
        ({"prompt": 3}, [], "prompt 3 is not a text; write it in quotes"),
        ({"prompt": "a", "sede": 1}, [], "unknown keys sede; known are prompt, negative_prompt"),
        ({"prompt": "a", "loar": "x"}, [], "unknown keys loar; known are prompt, .*lora"),
        ({"prompt": "a", "lora": 3}, [], "lora 3 is not a text, or a list of texts"),
        ({"prompt": "a", "lora_2": ["a", 3]}, [], r"lora_2 .* is not a text, or a list of texts"),
        ({"prompt": "a", "lora_scale": "1"}, [], "lora_scale '1' is not a number, or a list of numbers"),
        ({"prompt": "a", "lora_scale": 0.5}, [], "--lora-scale weighs --lora, which is not given"),
        ({"prompt": "a", "lora": "nowhere.safetensors"}, [], "--lora nowhere.safetensors is no file"),
        ({"prompt": "a", "lora_2": "a/b"}, ["--model=tiny-ti2v"], "--lora-2 a/b is for a second expert"),
        ({"prompt": True}, [], "prompt True is not a text; write it in quotes"),
        ({"prompt": "a", "seed": True}, [], "seed True is not a whole number"),
        ({"prompt": "a", "num_frames": True}, [], "num_frames True is not a whole number"),
        ({"prompt": "a", "strength": True}, [], "strength True is not a finite number"),
        ({"prompt": "a", "lora": "x", "lora_scale": True}, [], "lora_scale True is not a number, or a list of numbers"),
        ({"prompt": "a", "lora": [True]}, [], r"lora \[True\] is not a text, or a list of texts"),
        ({"prompt": "a", "reference_image": [True]}, [], r"reference_image \[True\] is not a list of texts"),
        ({"prompt": "a", "seed": None}, [], "seed is null; leave it out"),
        ({"prompt": "a", "seed": -1}, [], "seed -1 is below 0; give a whole number"),
        ({"prompt": "a", "height": "64"}, [], "height '64' is not a whole number"),
        ({"prompt": "a", "seed": 2**64 - 1}, ["--videos-per-prompt=2"], "seed .* is above"),
        ({"prompt": "a", "height": 72}, [], "height 72: .* use 64 or 80"),
        ({"prompt": "a", "num_frames": 6}, [], "num-frames 6: .* use 5 or 9"),
        ({"prompt": "a", "negative_prompt": "grey"}, ["--guidance-scale=1"], "switches guidance off"),
        ({"prompt": "a", "image": __file__}, [], "makes videos from text alone"),
        ({"prompt": "a", "image": "nowhere.png"}, ["--model=tiny-i2v"], "into two files"),
    ],
)
def test_refused_by_file_and_line(
    line: Any,
    flags: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(generate_job, "load_pipeline", load)
    file = _file(tmp_path, {"prompt": "a cat"}, line)
    assert main([*TINY, "--prompt-file", file, *flags, "--output", str(tmp_path / "video.mp4")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"{file} line 3" in error
    assert re.search(text, error)


def _rank_reads_its_own_file(rank: int, folder: str) -> None:
    file = Path(folder, "prompts.jsonl")
    text, read = json.dumps({"prompt": f"cat {rank}"}), Path.read_text
    Path.read_text = lambda path, **how: text if path == file else read(path, **how)  # type: ignore[assignment, method-assign]
    with Path(folder, f"rank_{rank}").open("w") as stderr, redirect_stderr(stderr):
        assert main(["--prompt-file", str(file), *SPARSE, "--ring-degree=2", "--output", f"{folder}/video.mp4"]) == 2


def test_ranks_that_read_other_lines_all_say_so(tmp_path: Path) -> None:
    run_ranks(2, _rank_reads_its_own_file, str(tmp_path))
    for rank in range(2):
        assert "ranks differ in video 0" in (tmp_path / f"rank_{rank}").read_text()
