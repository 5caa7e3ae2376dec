"""`sp_sparse.fidelity` end to end: in this process, on forked ranks, and as processes that are killed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sp_sparse.fidelity import job
from sp_sparse.fidelity.__main__ import main
from sp_sparse.fidelity.arguments import FidelityArguments, parse_arguments
from sp_sparse.fidelity.plan import Setting
from sp_sparse.fidelity.store import Item, ResultStore
from sp_sparse.flags import options_of
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.random_models import tiny_text_to_video
from tests.processes import process_of_rank, wait_for
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
# 4 x 4 x 4 tokens, 8 blocks of 8.
SMALL = ["--model=tiny", "--height=64", "--width=64", "--num-frames=13", "--num-inference-steps=2", "--block-sizes=8"]
BACKEND = ["--sparse-attn-backend", "reference"]
PROMPTS = ("a red ball rolls to the left", "a <b>dog</b> & a cat")


def _flags(folder: Path, *more: str, name: str = "out") -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return ["--prompts", str(prompts), "--output", str(folder / name), *SMALL, *BACKEND, *more]


def _lines(folder: Path, name: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "fidelity.jsonl").read_text().splitlines()]


def _rank_measures(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def _error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that a refused job prints."""
    capsys.readouterr()
    assert main(list(flags)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = _flags(
        tmp_path,
        *("--seeds", "2", "--densities", "0.2,1", "--selectors", "topk,mass", "--orders", "raster,hilbert"),
        *("--caption-check", "tests.fidelity_captions:brightness", "--shown", "1"),
    )
    assert main(flags) == 0
    told = capsys.readouterr().err
    assert told.count("LPIPS is left out") <= 1
    # 2 prompts x 2 seeds x (dense, floor, 8 settings), and the masks of the 4 sparse settings.
    assert re.search(r"^44 of 44: masks of mass, drop, hilbert, d=0.2; 0 s left$", told, re.MULTILINE)
    lines = _lines(tmp_path)
    assert len(lines) == 40
    for line in lines:
        _check_line(line)
    assert {line["kind"] for line in lines} == {"dense", "floor", "sparse"}
    assert len({Item.of_line(line) for line in lines}) == 40
    assert any(line["psnr"] is not None for line in lines if line["kind"] == "floor"), "it is the same kernel"
    for line in lines:
        if line["kind"] == "floor" or (line["setting"] or {}).get("density") == 1.0:
            assert line["psnr"] is None or line["psnr"] > 70
        elif line["kind"] == "sparse":
            assert 20 < line["psnr"] < 65
            assert line["density"] == 0.25  # 2 of 8 blocks
            assert line["calls"]["reference"] == 8
    _check_files(tmp_path / "out")


def _check_line(line: dict[str, Any]) -> None:
    figures = {"psnr", "ssim", "lpips", "caption", "density", "density_all", "seconds", "decode_seconds"}
    assert set(line) == {
        *(
            "kind",
            "prompt",
            "seed",
            "setting",
            "finite",
            "calls",
            "kv_exchange",
            "mesh",
            "batch",
            "model",
            "device",
            "versions",
            "date",
        ),
        *figures,
    }
    for name in figures - {"lpips"}:
        assert isinstance(line[name], float) or (line[name] is None and name in ("psnr", "ssim")), name
    assert (line["ssim"] is None) == (line["kind"] == "dense")
    assert line["finite"]
    assert 0 <= line["caption"] <= 1
    assert line["kv_exchange"] == []
    assert line["mesh"] == {"ulysses": 1, "ring": 1, "cfg": 1}
    assert {"python", "torch", "sp_sparse", "diffusers", "torchmetrics"} <= set(line["versions"])
    assert (line["setting"] is None) == (line["kind"] != "sparse")
    if line["setting"] is not None:
        assert Setting.from_json(line["setting"]).block_size == (8, 8)


def _check_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("run.json", "fidelity.jsonl", "fidelity.md", "fidelity.txt", "index.html", "psnr.png", "ssim.png"),
        *("frames", "masks"),
    }
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;dog" not in page, "only the first prompt is shown"
    # Everything that it refers to lies within it.
    references = re.findall(r"""(?:src|href|poster|data|action)\s*=\s*["']?([^"'\s>]{0,20})""", page)
    assert len(references) > 25
    assert all(reference.startswith("data:") for reference in references)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert page.count("<video") == 10
    assert page.count("data:video/mp4;base64,") == 10
    assert page.count('class="mask"') == 4 * 2 * 2  # settings x layers x steps
    table = (folder / "fidelity.md").read_text(encoding="utf-8")
    assert "| setting | density | of all calls | PSNR dB | Δ PSNR dB | SSIM | Δ SSIM | caption |" in table
    assert "Attention mass covered" in table
    # What is dense, and everything of the first prompt at seed 0.
    assert len(list((folder / "frames").iterdir())) == 4 + 9


def test_lists_in_a_configuration_file(tmp_path: Path) -> None:
    lists = {
        "densities": [0.1, 0.2],
        "selectors": ["topk", "mass"],
        "dense_steps": 2,
        "block_sizes": ["16x8", 8],
        "keep_diagonal": [True, False],
        "noise_floor": "false",
    }
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    arguments = parse_arguments(["--config", str(tmp_path / "lists.json"), "--prompts", "p", "--output", "o"])
    assert arguments.densities == (0.1, 0.2)
    assert arguments.selectors == ("topk", "mass")
    assert arguments.dense_steps == (2,)
    assert arguments.block_sizes == ((16, 8), (8, 8))
    assert arguments.keep_diagonal == (True, False)
    assert arguments.noise_floor is False
    assert len(arguments.settings) == 16
    assert arguments.settings[0].config("auto").dense_steps == 2


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(_flags(tmp_path, "--densities", "0.2")) == 0
    path = tmp_path / "out" / "fidelity.jsonl"
    before = path.read_bytes()
    (tmp_path / "out" / "index.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(job, "load_pipeline", lambda *_: pytest.fail("nothing is missing"))
        assert main(_flags(tmp_path, "--densities", "0.2")) == 0
    assert path.read_bytes() == before
    assert (tmp_path / "out" / "index.html").exists()
    # A line that was cut off, and one density more.
    path.write_bytes(before[:-20])
    assert main(_flags(tmp_path, "--densities", "0.2,0.5")) == 0
    lines = _lines(tmp_path)
    assert len(lines) == len({Item.of_line(line) for line in lines}) == 8
    assert path.read_bytes().startswith(before[: before[:-1].rfind(b"\n") + 1])
    repeated = json.loads(before.splitlines()[-1])
    (again,) = (line for line in lines if Item.of_line(line) == Item.of_line(repeated))
    assert again["psnr"] == repeated["psnr"], "the same noise gives the same video"


def test_a_report_of_what_is_there_renders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = _error(capsys, *_flags(tmp_path, "--report-only", "true"))
    assert "has no measured video to report; measure some, without --report-only" in nothing
    assert main(_flags(tmp_path, "--densities", "0.2", "--masks", "false")) == 0
    monkeypatch.setattr(job, "load_pipeline", lambda *_: pytest.fail("nothing is rendered"))
    # A setting and a seed more, which are missing, and no model where the report is written.
    more = ["--densities", "0.2,0.5", "--seeds", "2", "--model", str(tmp_path / "gone"), "--report-only", "true"]
    (tmp_path / "out" / "fidelity.md").unlink()
    assert main(_flags(tmp_path, *more)) == 0
    assert len(_lines(tmp_path)) == 6
    assert "0.2" in (tmp_path / "out" / "fidelity.md").read_text()


def test_dense_frames_that_are_gone_are_made_again(tmp_path: Path) -> None:
    assert main(_flags(tmp_path, "--densities", "0.2", "--masks", "false")) == 0
    frames = sorted((tmp_path / "out" / "frames").glob("dense-*"))
    before = np.load(frames[0])["frames"]
    frames[0].write_bytes(frames[0].read_bytes()[:100])
    frames[1].unlink()
    assert main(_flags(tmp_path, "--densities", "0.2,0.5", "--masks", "false")) == 0
    assert (np.load(frames[0])["frames"] == before).all()
    assert len(ResultStore(tmp_path / "out").lines()) == 8


@pytest.mark.parametrize("degrees", [["--ring-degree", "2"], ["--ulysses-degree", "2"], ["--cfg-parallel-degree", "2"]])
def test_two_ranks_measure_as_one(tmp_path: Path, degrees: list[str]) -> None:
    more = ["--densities", "0.2,0.5", "--remainders", "drop,linear"]
    assert main(_flags(tmp_path, *more)) == 0
    run_ranks(2, _rank_measures, _flags(tmp_path, *more, *degrees, name="two"))
    one, two = ({Item.of_line(line): line for line in _lines(tmp_path, name)} for name in ("out", "two"))
    assert set(one) == set(two)
    for item, line in one.items():
        other = two[item]
        assert line["density"] == pytest.approx(other["density"], abs=1e-12)
        if item.kind == "sparse":
            assert line["psnr"] == pytest.approx(other["psnr"], abs=0.05)
            assert line["ssim"] == pytest.approx(other["ssim"], abs=1e-3)
        else:
            assert (line["psnr"], line["ssim"]) == (other["psnr"], other["ssim"])
    masks = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert len(masks) == 2
    for name in masks:
        first, second = (np.load(tmp_path / folder / "masks" / name) for folder in ("out", "two"))
        assert (first["masks"] == second["masks"]).all()
        assert np.abs(first["covered"] - second["covered"]).max() < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_measures_as_one_video_does(tmp_path: Path, ranks: int) -> None:
    """3 of 4 videos together, and the one that is left; then what was lost of a batch is made again with all of it."""
    more = ["--seeds", "2", "--densities", "0.2", "--remainders", "linear", "--masks", "false"]
    assert main(_flags(tmp_path, *more)) == 0
    flags = _flags(tmp_path, *more, "--batch", "3", *(["--ring-degree", "2"] if ranks > 1 else []), name="batches")
    run_ranks(ranks, _rank_measures, flags)
    one, batched = ({Item.of_line(line): line for line in _lines(tmp_path, name)} for name in ("out", "batches"))
    assert set(one) == set(batched)
    assert sorted(line["batch"] for line in batched.values()) == [1] * 3 + [3] * 9
    for item, line in batched.items():
        if item.kind == "sparse":
            assert line["psnr"] == pytest.approx(one[item]["psnr"], abs=0.05)
            assert line["density"] == pytest.approx(one[item]["density"], abs=0.01)
        elif item.kind == "dense":
            dense, alone = (ResultStore(tmp_path / name).frames(item) for name in ("batches", "out"))
            assert dense is not None
            assert np.abs(dense.astype(int) - alone).max() <= 1
    path = tmp_path / "batches" / "fidelity.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:7]))
    run_ranks(ranks, _rank_measures, flags)
    again = {Item.of_line(line): line for line in _lines(tmp_path, "batches")}
    assert {item: line["psnr"] for item, line in again.items()} == {i: line["psnr"] for i, line in batched.items()}
    assert len(_lines(tmp_path, "batches")) == 12


def test_a_batch_of_another_size_does_not_go_into_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = _flags(tmp_path, "--densities", "0.2", "--masks", "false")
    assert main(flags) == 0
    assert "batch 1 there, 2 now" in _error(capsys, *flags, "--batch", "2")


def _command(ranks: int, flags: list[str]) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *start, "-m", "sp_sparse.fidelity", *flags]


def _stop_after_some_videos(folder: Path, flags: list[str], number: int, ranks: int = 1) -> tuple[int, str]:
    """Start it, and send a signal to it, or to the last of its ranks, once some videos are measured."""
    log = folder / "log.txt"
    with log.open("wb") as stderr:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # A shell starts what runs in the background, as tests may, with interrupts ignored.
        process = subprocess.Popen(
            _command(ranks, flags), cwd=folder, env=environment, stderr=stderr,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            lines = folder / "out" / "fidelity.jsonl"
            wait_for(lambda: (lines.exists() and lines.read_bytes().count(b"\n") >= 3) or process.poll() is not None)
            target = process.pid if ranks == 1 else process_of_rank(process.pid, ranks - 1)
            assert target is not None
            os.kill(target, number)
            return process.wait(120), log.read_text()
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_measurement_goes_on(tmp_path: Path, number: int, status: int) -> None:
    flags = _flags(tmp_path, "--seeds", "4", "--densities", "0.2,0.3,0.5", "--masks", "false", "--shown", "0")
    found, told = _stop_after_some_videos(tmp_path, flags, number)
    assert found == status, told
    assert (number != signal.SIGINT) or "the same command goes on after the last video that was measured" in told
    before = (tmp_path / "out" / "fidelity.jsonl").read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 40
    assert main(flags) == 0
    assert (tmp_path / "out" / "fidelity.jsonl").read_bytes().startswith(kept)
    lines = _lines(tmp_path)
    assert len(lines) == len({Item.of_line(line) for line in lines}) == 2 * 4 * 5


def test_a_rank_that_dies_ends_all_with_a_sentence(tmp_path: Path) -> None:
    flags = _flags(tmp_path, "--seeds", "4", "--densities", "0.2,0.3,0.5", "--masks", "false", "--ring-degree", "2")
    status, told = _stop_after_some_videos(tmp_path, flags, signal.SIGKILL, ranks=2)
    assert status not in (0, None)
    assert re.search(r"error: .*(a rank stopped|another rank failed)", told), told
    assert ResultStore(tmp_path / "out").lines()


def test_a_full_disk_is_told_and_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = _flags(tmp_path, "--densities", "0.2", "--masks", "false")
    synced: list[int] = []

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) == 5:
            os.ftruncate(file, os.fstat(file).st_size - 30)  # the end of the line found no room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        told = _error(capsys, *flags)
    assert "is full; free some room and start the same command again: it goes on after the last video" in told
    assert not (tmp_path / "out" / "fidelity.jsonl").read_bytes().endswith(b"\n")
    assert main(flags) == 0
    assert len(_lines(tmp_path)) == 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_under_the_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "savez_compressed", full)
    assert "is full; free some room" in _error(capsys, *_flags(tmp_path))
    assert not list((tmp_path / "out" / "frames").iterdir())


def test_another_size_does_not_go_into_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_flags(tmp_path, "--densities", "0.2", "--masks", "false")) == 0
    told = _error(capsys, *_flags(tmp_path, "--num-inference-steps", "3", "--guidance-scale", "2"))
    assert (
        "num_inference_steps 2 there, 3 now; guidance_scale 3.0 there, 2.0 now; give the same again, or another" in told
    )
    told = _error(capsys, *_flags(tmp_path, "--model", "tiny-ti2v", "--height=64", "--width=64"))
    assert "model 'tiny' there, 'tiny-ti2v' now" in told


def _lora(folder: Path) -> str:
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    transformer = tiny_text_to_video(torch.float32).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(transformer))
    return str(folder / "lora")


@pytest.mark.parametrize("what", ["lora_scale", "lora_scale_2", "boundary_ratio", "vae_tiling"])
def test_what_all_videos_share_is_made_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    plain, given = {
        "lora_scale": (["--lora", "LORA"], ["--lora-scale", "0.1"]),
        "lora_scale_2": (["--lora-2", "LORA"], ["--lora-scale-2", "0.1"]),
        "boundary_ratio": ([], ["--boundary-ratio", "0.1"]),
        # Larger than a tile.
        "vae_tiling": (["--height=272", "--width=288", "--num-frames=1"], ["--vae-tiling"]),
    }[what]
    if "LORA" in plain:
        plain = [plain[0], _lora(tmp_path)]
    more = ["--densities", "0.5", "--masks", "false", "--noise-floor", "false", *plain]
    dense = []
    for name, flags in (("plain", more), ("given", [*more, *given])):
        assert main(_flags(tmp_path, *flags, name=name)) == 0
        dense.append(ResultStore(tmp_path / name).frames(Item("dense", PROMPTS[0], 0)))
    first, second = dense
    assert first is not None
    assert second is not None
    assert (first != second).any()
    told = _error(capsys, *_flags(tmp_path, *more, *given, name="plain"))
    assert f"{what} None there, " in told
    assert "there, None now" in _error(capsys, *_flags(tmp_path, *more, name="given"))


def test_every_flag_of_generate_is_taken_or_is_about_one_video() -> None:
    own = {flag.name for flag in options_of(GenerateArguments)}
    taken = {flag.name for flag in options_of(FidelityArguments)}
    # What is listed instead, what is written, and what judges or times one job.
    instead = {"prompt", "prompt_file", "videos_per_prompt", "seed", "sparse_attn_preset"}
    written = {"output_latents", "output_frames", "output_masks", "report"}
    of_a_job = {"compile", "verify", "verify_tolerance", "repeat"}
    # Videos that start from others are not compared here.
    from_videos = {"video", "strength", "mask", "reference_image", "conditioning_scale"}
    assert own - taken == instead | written | of_a_job | from_videos


def test_another_last_frame_does_not_go_into_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    paths = [str(tmp_path / f"{color}.png") for color in ("red", "blue")]
    for color, path in zip(("red", "blue"), paths, strict=True):
        Image.new("RGB", (64, 64), color).save(path)
    flags = _flags(tmp_path, "--model=tiny-i2v", "--densities=0.2", "--masks=false", "--image", paths[0])
    assert main([*flags, "--last-image", paths[0]]) == 0
    for other, now in (([], "None"), (["--last-image", paths[1]], repr(paths[1]))):
        assert f"last_image {paths[0]!r} there, {now} now" in _error(capsys, *flags, *other)


def test_a_broken_line_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fidelity.jsonl").write_text("{}\n")
    assert "fidelity.jsonl:1 cannot be read ('kind'); remove this line" in _error(capsys, *_flags(tmp_path))


def test_a_remainder_that_the_kernel_cannot_merge_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_pipeline", lambda *_: pytest.fail("weights are read"))
    flags = ["--sparse-attn-backend", "tests.test_remainder:NoLse", "--remainders", "drop,linear"]
    told = _error(capsys, *_flags(tmp_path, *flags))
    assert "'tests.test_remainder:NoLse' returns no LSE, which remainder='linear' needs to be merged; use fa4" in told
    assert told.endswith("or remainder='drop'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.json", b"{", "run.json cannot be read (Expecting property name"),
        ("run.json", b"[]", "run.json holds a list, not what a run was begun with; give another --output"),
        ("run.json", None, "run.json cannot be read (Is a directory); give another --output"),
        ("fidelity.jsonl", None, "cannot be used (Is a directory); give another --output"),
        (
            "fidelity.jsonl",
            b"\xff\xfe\n",
            "fidelity.jsonl:1 cannot be read (Expecting value: line 1 column 1 (char 0)); remove",
        ),
        (
            "fidelity.jsonl",
            b'{"kind": "dense", "prompt": "a", "seed": 0, "setting": null}\n',
            "fidelity.jsonl:1 cannot be read ('density'); remove this line, and its video is made again",
        ),
    ],
)
def test_a_folder_that_something_else_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    assert expected in _error(capsys, *_flags(tmp_path))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--prompts", ""], "--prompts is missing; give a file with one prompt a line"),
        (["--output", ""], "--output is missing; give a folder for the results"),
        (
            ["--prompts", "missing.txt"],
            "--prompts missing.txt cannot be read (No such file or directory); give a text file",
        ),
        (["--output", __file__], f"--output {__file__} cannot be used (Not a directory); give another --output"),
        (["--prompts", "lines.jsonl"], "give a text file with one prompt a line"),
        (["--selectors", "topk,best"], "unknown selector 'best'; use one of topk"),
        (["--remainders", "drop,guess"], "remainder='guess' is not known; use one of drop, mean, linear"),
        (["--orders", "raster,spiral"], "token_order='spiral' is not known; use one of raster, tile, hilbert"),
        (["--densities", "0.1,0"], "topk 0.0 is outside (0, 1]"),
        (["--densities", "much"], "--densities: 'much' cannot be read"),
        (["--block-sizes", "4"], "block_size (4, 4): each of (query, key) must be in [8, 256]"),
        (["--dense-steps", "2"], "--dense-steps 2 leaves none of 2 steps sparse; use fewer"),
        (["--seeds", "0"], "--seeds 0 is below 1"),
        (["--baseline", "remainder=linear"], "remainder 'linear' is not measured; use one of drop"),
        (["--caption-check", "tests.fidelity_captions:missing"], "cannot be loaded"),
        (["--caption-check", "tests.fidelity_captions:NO_CHECK"], "NO_CHECK is a str; give package.module:function"),
        (
            ["--caption-check", "tests.fidelity_captions:broken"],
            "--caption-check failed for 'a red ball rolls to the left' (KeyError: 'a red ball rolls to the left'); mend it",
        ),
        (["--caption-check", "tests.fidelity_captions:wrong"], "--caption-check gave 2.0 for 'a red ball"),
        (["--sparse-attn-backend", "none"], "leaves attention dense, which is rendered anyhow; use auto"),
        (["--ring-degree", "2"], "2 ranks are asked for, but 1 run"),
        (["--num-frames", "12"], "frames are 4n + 1; use 9 or 13"),
        (["--lora-scale", "0.5"], "--lora-scale weighs --lora, which is not given"),
        (["--boundary-ratio", "1"], "leaves the first expert no step"),
        (
            ["--boundary-ratio", "0.5", "--model", "tiny-ti2v"],
            "is for a second expert, which tiny-ti2v has not; leave --boundary-ratio out",
        ),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str) -> None:
    assert expected in _error(capsys, *_flags(tmp_path, *more))
