"""`sp_sparse.generate` end to end: in this process, on forked ranks, and under torchrun where a process matters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from launch.compare import main as compare
from launch.mini.captions import kinds_told, vocabulary
from launch.mini.scenes import Kind
from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.asked import fill_defaults
from sp_sparse.generate.files import whole_file
from sp_sparse.generate.mini import mini_folder
from sp_sparse.generate.models import find_model
from sp_sparse.generate.prompts import wanted_videos
from sp_sparse.generate.random_models import tiny_image_to_video, tiny_text_to_video
from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.processes import process_of_rank, wait_for
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "tiny"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3"]


def _generate(folder: Path, *flags: str, name: str = "video", status: int = 0) -> dict[str, Any]:
    """Run in this process; returns the report."""
    assert main([*TINY, *flags, "--output", str(folder / f"{name}.mp4")]) == status
    report: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return report


def _rank_generates(rank: int, flags: list[str], status: int) -> None:
    assert main([*TINY, *flags]) == status


def _error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that a refused job prints."""
    assert main([*TINY, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v", "tiny-ti2v"])
def test_one_rank(tmp_path: Path, model: str) -> None:
    latents = tmp_path / "latents.pt"
    report = _generate(tmp_path, "--model", model, *SPARSE, "--output-latents", str(latents))
    assert (tmp_path / "video.mp4").stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents.pt", "video.json", "video.mp4"]
    assert torch.load(latents, weights_only=True).isfinite().all()
    attention = report["attention"]
    assert attention["calls"]["reference"] > 0
    # Step 0 and layer 0 are dense, the others keep 0.3 of the blocks, rounded up, and their own.
    densities = {(d["layer"], d["step"]): d["density"] for d in attention["densities"]}
    assert densities[0, 3] == densities[1, 0] == 1.0
    assert 0.3 <= densities[1, 3] < 0.5
    assert {d["expert"] for d in attention["densities"]} == ({0} if model == "tiny-ti2v" else {0, 1})
    assert attention["dense_calls"] == attention["calls"]["dense"]
    assert set(report["seconds"]) == {"load", "encode", "denoise", "decode", "save"}
    assert len(report["videos"][0]["step_seconds"][0]) == 4
    assert report["peak_memory"]["process_bytes"]["denoise"] > 1 << 20
    assert report["versions"]["diffusers"] == diffusers.__version__
    assert report["arguments"]["sparse"]["block_size"] == [16, 16]


def test_ti2v_from_an_image_has_a_timestep_for_every_token(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "teal").save(tmp_path / "first.png")
    _generate(tmp_path, "--model", "tiny-ti2v", "--image", str(tmp_path / "first.png"), *SPARSE)


def test_backend_none_leaves_the_model_alone(tmp_path: Path) -> None:
    report = _generate(tmp_path)
    assert report["attention"] is None
    assert report["videos"][0]["prompt"] == report["arguments"]["prompt"] == "a cat walks on the grass"


def test_without_a_model_it_is_mini_with_a_caption_of_its_words() -> None:
    arguments = parse_arguments([])
    assert arguments.model == parse_serve_arguments([]).model == "mini"
    assert FidelityArguments(prompts="prompts.txt", output="out").base().model == "mini"
    caption = fill_defaults(arguments, find_model(arguments, torch.device("cpu"))).prompt
    assert caption is not None
    assert kinds_told(caption) == [Kind("red", "circle", "right")]
    assert set(caption.rstrip(".").split()) <= set(vocabulary())


@pytest.mark.parametrize("flags", [[], ["--sparse-attn-preset", "fast"]])
def test_mini_without_its_weights_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sp_sparse.generate.models.mini_folder", lambda: mini_folder(tmp_path))
    assert main(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--model mini (the default) has no weights in" in error
    assert error.endswith("or give another --model: a Wan checkpoint, or tiny (random weights)")


@pytest.mark.parametrize(
    ("degrees", "against", "tolerance"),
    [
        (["--ulysses-degree", "2"], "single", "1e-5"),
        (["--ring_degree=2"], "dense", "0.5"),
        (["--cfg-parallel-degree", "2"], "single", "1e-5"),
    ],
    ids=["ulysses", "ring", "cfg"],
)
def test_two_ranks(tmp_path: Path, degrees: list[str], against: str, tolerance: str) -> None:
    flags = [*SPARSE, *degrees, "--verify", against, "--verify-tolerance", tolerance]
    run_ranks(2, _rank_generates, [*flags, "--output", str(tmp_path / "video.mp4")], 0)
    report = json.loads((tmp_path / "video.json").read_text())
    assert report["ranks"] == 2
    assert report["verify"]["passed"]
    difference = report["verify"]["videos"][0]
    assert difference["latents"]["relative_rms"] <= float(tolerance)
    assert difference["frames"]["max_abs"] < 0.2
    # Dense attention is another result: a comparison that saw nothing would not notice.
    assert against == "single" or difference["latents"]["relative_rms"] > 1e-4


def test_four_ranks_equal_one_and_the_comparison_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(name: str) -> list[str]:
        tensors = [f"--output-{kind}={tmp_path / name}-{kind}.pt" for kind in ("latents", "frames")]
        return [*TINY, *SPARSE, "--output", str(tmp_path / f"{name}.mp4"), *tensors]

    run_ranks(4, _rank_generates, [*flags("four"), "--ulysses-degree", "2", "--ring-degree", "2"], 0)
    assert main(flags("one")) == 0
    assert main([*flags("other"), "--seed", "1"]) == 0
    reports = {name: str(tmp_path / f"{name}.json") for name in ("one", "four", "other")}
    capsys.readouterr()
    assert compare([reports["one"], reports["four"]]) == 0
    table = capsys.readouterr().out
    assert "ulysses 2 x ring 2  4      reference" in table
    assert compare([reports["one"], reports["other"]]) == 1
    densities = [json.loads(Path(reports[name]).read_text())["attention"]["mean_density"] for name in ("one", "four")]
    assert densities[0] == pytest.approx(densities[1], abs=1e-12)


def test_verify_tolerance_sets_the_exit_status(tmp_path: Path) -> None:
    report = _generate(tmp_path, *SPARSE, "--verify", "dense", "--verify-tolerance", "1e-6", status=1)
    assert not report["verify"]["passed"]


def test_several_prompts_and_repetitions(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    report = _generate(
        tmp_path, "--prompt_file", str(tmp_path / "prompts.txt"), "--repeat=2", "--num_inference_steps", "2"
    )
    assert [video["prompt"] for video in report["videos"]] == ["a cat", "a dog"]
    assert [len(video["step_seconds"]) for video in report["videos"]] == [2, 2]
    assert (tmp_path / "video_0.mp4").exists()
    assert (tmp_path / "video_1.mp4").exists()


def test_configuration_file_and_flags_over_it(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(
        "model: tiny-i2v\nseed: 3\nnum-frames: 9\nprompt: a fox\ncompile: false\nsparse_attn_backend: reference\n"
        "sparse-attn-schedule: table\nsparse-attn-schedule-table: [[1, 0.5], [0.25]]\nsparse_attn_keep_diagonal: false\n"
    )
    arguments = parse_arguments(["--config", str(config), "--seed", "4", "--sparse_attn_dense_layers", "1"])
    assert (arguments.model, arguments.seed, arguments.num_frames) == ("tiny-i2v", 4, 9)
    assert arguments.sparse.schedule_table == ((1.0, 0.5), (0.25,))
    assert (arguments.sparse.dense_layers, arguments.sparse.keep_diagonal) == (1, False)
    same = tmp_path / "job.json"
    same.write_text(
        json.dumps({"model": "tiny-i2v", "seed": 3, "sparse_attn_backend": "auto", "sparse_attn_block_size": "32x16"})
    )
    assert parse_arguments(["--config", str(same)]).sparse.block_size == (32, 16)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    (video,) = wanted_videos(parse_arguments(["--config", str(config), "--prompt-file", str(prompts)]))
    assert (video.arguments.prompt, video.arguments.seed) == ("a cat", 3)
    same.write_text(json.dumps({"sparse_attn_preset": "fast", "sparse_attn_dense_layers": 1}))
    named = parse_arguments(["--config", str(same), *TINY, "--sparse-attn-topk", "0.15"])
    assert named.sparse_attn_preset == "fast", "the report tells it"
    assert (named.sparse.backend, named.sparse.topk, named.sparse.remainder) == ("auto", 0.15, "linear")
    assert (named.sparse.dense_layers, named.sparse.block_size) == (1, (16, 16))
    default = parse_arguments(["--sparse-attn-preset", "fast"])
    assert (default.model, default.sparse.block_size) == ("mini", (64, 64))


def test_local_path(tmp_path: Path) -> None:
    tiny_text_to_video(torch.float32).save_pretrained(tmp_path / "model")
    size = ["--height", "128", "--width", "128", "--num-frames", "17", "--num-inference-steps", "4"]
    own = [*SPARSE, "--sparse-attn-block-size", "16", "--guidance-scale", "3", "--flow-shift", "3", *size]
    latents = [tmp_path / "built.pt", tmp_path / "loaded.pt"]
    for model, path in zip(("tiny", str(tmp_path / "model")), latents, strict=True):
        _generate(tmp_path, "--model", model, *own, "--output-latents", str(path))
    built, loaded = (torch.load(path, weights_only=True) for path in latents)
    torch.testing.assert_close(loaded, built, rtol=0, atol=0)


def test_local_image_to_video_needs_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_image_to_video(torch.float32).save_pretrained(tmp_path / "model")
    assert "give its first frame with --image" in _error(capsys, "--model", str(tmp_path / "model"))


def test_lora_of_each_expert(tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = tiny_text_to_video(torch.float32).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(transformer))
    lora = str(tmp_path / "lora")
    latents = {}
    for name, flags in {"no": [], "first": ["--lora", lora], "second": ["--lora-2", lora]}.items():
        _generate(tmp_path, *SPARSE, *flags, "--output-latents", str(tmp_path / f"{name}.pt"))
        latents[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert not torch.equal(latents["no"], latents["first"])
    assert not torch.equal(latents["no"], latents["second"])
    assert not torch.equal(latents["first"], latents["second"])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--ulysses-degree", "2"], r"ulysses 2 x ring 1 x cfg 1 = 2 ranks are asked for, but 1 run"),
        (["--ring-degree", "0"], "--ring-degree 0 is below 1"),
        (["--sparse-attn-backend", "nonesuch"], "unknown sparse attention backend 'nonesuch'; use one of auto"),
        (
            ["--sparse-attn-backend", "auto", "--sparse-attn-selector", "best"],
            "unknown selector 'best'; use one of topk, subblock, window",
        ),
        ([*SPARSE, "--sparse-attn-topk", "0"], r"topk 0.0 is outside \(0, 1\]"),
        ([*SPARSE, "--sparse-attn-topk", "1.5"], r"topk 1.5 is outside \(0, 1\]"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--cfg-parallel-degree", "2", *SPARSE, "--guidance-scale", "1"], "use a scale above 1"),
        (["--cfg-parallel-degree", "2"], "--sparse-attn-backend none leaves off"),
        (["--verify", "single"], "choose a backend such as auto"),
        (["--output", "video.avi"], "must end in .mp4"),
        (["--output-latents", "a.pt", "--output-frames", "./a.pt"], "one would overwrite the other; give two files"),
        (
            ["--prompt-file", "nowhere.txt"],
            r"--prompt-file nowhere\.txt cannot be read \(No such file.*; give a text file",
        ),
        (["--prompt-file", str(ROOT)], r"cannot be read \(Is a directory\)"),
        (["--output", f"{__file__}/video.mp4"], "cannot be written .*choose another path"),
        (["--sparse-attn-backend", "os:getcwd"], "'os:getcwd' is no class with missing, __call__; give package"),
        (["--model", ""], "--model is empty; give mini, another name of --help, a folder, or a hub id"),
        (["--lora", __file__], "cannot be read .it is no file of weights.; give LoRA weights"),
        (["--model", str(ROOT / "tests")], "has no model_index.json"),
        (["--model", "tiny", "--image", __file__], "makes videos from text alone"),
        (["--lora-2", "x", "--model", "tiny-ti2v"], "which tiny-ti2v has not"),
    ],
)
def test_refusals(
    flags: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(text, _error(capsys, *flags))
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "zero.mp4"
    link.symlink_to("/dev/zero")
    told = _error(capsys, "--model", "tiny", "--output", str(link))
    assert "zero.mp4 cannot be written (it is no regular file); choose another path" in told
    with (
        pytest.raises(OSError, match=r"zero.mp4 is no regular file; choose another path"),
        whole_file(link) as temporary,
    ):
        temporary.touch()
    assert link.is_char_device()


def test_a_prompt_file_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes("ein Bär".encode("latin-1"))
    told = _error(capsys, "--model", "tiny", "--prompt-file", str(tmp_path / "prompts.txt"))
    assert "prompts.txt cannot be read (it is not UTF-8); give a text file in UTF-8" in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.yaml", None, "missing.yaml cannot be read (No such file or directory); give a YAML or JSON file"),
        (".", None, " cannot be read (Is a directory); give a YAML or JSON file"),
        ("job.yaml", b"prompt: caf\xe9", "job.yaml cannot be read (it is not UTF-8); give a YAML or JSON file"),
        ("job.json", b'{"seed": ', 'is not JSON (Expecting value: line 1 column 10 (char 9)); write {"flag": value}'),
        ("job.yaml", b"a: [1\nb: }", "; write one `flag: value` a line"),
        ("job.yaml", b"- 1", "job.yaml holds a list; write one `flag: value` a line"),
        # What YAML reads otherwise than it was meant, and what is no single value.
        ("job.yaml", b"prompt: yes", "job.yaml: prompt is True, not a text; write it in quotes"),
        ("job.yaml", b"prompt: 0123", "job.yaml: prompt is 83, not a text; write it in quotes"),
        ("job.yaml", b"verify: off", "job.yaml: verify is False, not a text; write it in quotes"),
        ("job.yaml", b"prompt: [a, b]", "job.yaml: prompt is ['a', 'b'], not a text; write it in quotes"),
        ("job.yaml", b"num_frames: {a: 1}", "job.yaml: num_frames is {'a': 1}; write one value, or a list of them"),
        # Truth values are no numbers.
        ("job.yaml", b"seed: true", "job.yaml: argument --seed: invalid int value: 'True'"),
        ("job.yaml", b"lora_scale: [true]", "argument --lora-scale: '[true]' cannot be read"),
        ("job.yaml", b"sparse_attn_topk: true", "argument --sparse-attn-topk: invalid float value: 'True'"),
        ("job.json", b'{"sparse_attn_schedule_table": [1, true]}', "True in a schedule table is not a number; give"),
    ],
)  # fmt: skip
def test_what_a_configuration_file_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert told in _error(capsys, "--config", str(tmp_path / name))


def test_unknown_key_in_the_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("sede: 3\n")
    assert "unknown keys sede; known are boundary_ratio, cfg_parallel_degree, compile" in _error(
        capsys, "--config", str(tmp_path / "job.yaml")
    )


def test_a_folder_with_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "holds a FluxPipeline, which is not a Wan pipeline" in _error(capsys, "--model", str(tmp_path))


def test_dense_sequence_parallelism_on_cpus_is_refused(tmp_path: Path) -> None:
    run_ranks(2, _rank_generates, ["--ulysses-degree", "2", "--output", str(tmp_path / "video.mp4")], 2)


class KernelWithoutLse(ReferenceKernel):
    info = KernelInfo(name="without-lse", returns_lse=False)


def test_what_the_library_refuses_is_refused_on_all_ranks(tmp_path: Path) -> None:
    backend = ["--sparse-attn-backend", "tests.test_generate:KernelWithoutLse", "--ring-degree", "2"]
    run_ranks(2, _rank_generates, [*backend, "--output", str(tmp_path / "video.mp4")], 2)
    assert not list(tmp_path.iterdir())


def _rank_generates_with_its_own_seed(rank: int, folder: str) -> None:
    told = Path(folder, f"rank_{rank}")
    with told.open("w") as stderr, redirect_stderr(stderr):
        flags = [*TINY, *SPARSE, "--ulysses-degree", "2", "--seed", str(rank)]
        assert main([*flags, "--output", f"{folder}/video.mp4"]) == 2


def test_different_arguments_are_told_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, _rank_generates_with_its_own_seed, str(tmp_path), timeout_s=20)
    for rank in range(2):
        assert "ranks differ in seed (rank 0: 0; rank 1: 1)" in (tmp_path / f"rank_{rank}").read_text()


def _torchrun(ranks: int, *flags: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "sp_sparse.generate", *TINY, *flags]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_as_a_script(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "launch" / "generate.py"), *TINY, "--num-inference-steps", "1"]
    done = subprocess.run(script, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "tiny_u1_r1_dense_0.mp4").exists()


def test_under_torchrun(tmp_path: Path) -> None:
    command = _torchrun(2, *SPARSE, "--ring-degree", "2")
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report: outputs/tiny_u1_r2_topk0.3_0.json") == 1
    assert (tmp_path / "outputs" / "tiny_u1_r2_topk0.3_0.mp4").exists()


def test_a_wrong_flag_is_told_once_under_torchrun(tmp_path: Path) -> None:
    command = _torchrun(2, "--no-such-flag")
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("error: unrecognized arguments: --no-such-flag") == 1


def test_a_rank_that_dies_stops_the_others(tmp_path: Path) -> None:
    flags = [*SPARSE, "--ulysses-degree", "2", "--num-inference-steps", "100000", "--timeout-s", "20"]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        job = subprocess.Popen(_torchrun(2, *flags), cwd=tmp_path, env=_environment(), stderr=stderr)
        try:
            wait_for(lambda: re.search(r"\d+/100000 ", log.read_text()) is not None, seconds=90)
            killed = process_of_rank(job.pid, 1)
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            assert job.wait(timeout=40) != 0
        finally:
            job.kill()
    text = log.read_text()
    assert "error: a rank stopped or did not answer within 20 s" in text or "rank 0: error: a rank stopped" in text
    assert not list(tmp_path.rglob("*.mp4"))
    assert not list(tmp_path.rglob("*.json"))
