"""Options of memory that contradict one another, and what is told where memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sp_sparse.fidelity.__main__ import main as fidelity
from sp_sparse.fidelity.arguments import parse_arguments as parse_fidelity_arguments
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.decode import VideoDecoding
from sp_sparse.generate.memory import (
    DECODE,
    DENOISE,
    ENCODE,
    LOAD,
    MemoryOptions,
    NotEnoughMemoryError,
    remedies,
    says_what_helps,
)
from sp_sparse.parallel.agreement import LostRankError, RefusedError
from sp_sparse.serve.arguments import parse_serve_arguments
from sp_sparse.serve.runner import job_error
from tests.ranks import run_ranks

SMALL = ["--model", "tiny", "--height", "64", "--width", "64", "--num-frames", "5"]
SMALL += ["--num-inference-steps", "2"]
FP8 = "--quantization fp8 (compute capability 8.9 and newer)"
DEGREES, LESS = "a higher --ulysses-degree or --ring-degree, on more GPUs", "a smaller or shorter video"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--offload", "all"], "--offload"),
        (["--offload", "layers", "--ring-degree", "2"], "both hook into every layer; use --offload idle, or"),
        (["--offload", "idle", "--fsdp", "--ring-degree", "2"], "moves whole ones to it; leave out one of them"),
    ],
)
def test_contradictions_are_refused_before_loading(flags: list[str], text: str) -> None:
    for parse in (parse_arguments, parse_serve_arguments):
        with pytest.raises(ValueError, match=text):
            parse(flags)


def test_the_flags_are_shared(tmp_path: Path) -> None:
    flags = ["--offload", "idle", "--vae-tiling"]
    wanted = MemoryOptions(offload="idle", vae_tiling=True)
    assert parse_arguments(flags).memory == wanted
    assert parse_serve_arguments(flags).base().memory == wanted
    own = ["--prompts", "prompts.txt", "--output", str(tmp_path)]
    assert parse_fidelity_arguments([*own, *flags]).base().memory == wanted


@pytest.mark.parametrize(
    ("options", "stage", "expected"),
    [
        (MemoryOptions(), LOAD, ("--offload idle", FP8, "--offload layers")),
        (MemoryOptions(), ENCODE, ("--offload idle", "--offload layers")),
        (MemoryOptions(), DENOISE, ("--offload idle", FP8, "--offload layers", DEGREES, LESS)),
        (MemoryOptions(ranks=2), ENCODE, ("--offload idle", "--fsdp", "--offload layers")),
        (MemoryOptions(ranks=2), DENOISE, ("--offload idle", FP8, "--fsdp", "--offload layers", DEGREES, LESS)),
        (MemoryOptions(ranks=2, fsdp=True), DENOISE, (FP8, DEGREES, LESS)),
        (MemoryOptions(), DECODE, ("--vae-tiling", "--offload idle", LESS)),
        (MemoryOptions(offload="idle"), DENOISE, (FP8, "--offload layers", DEGREES, LESS)),
        (MemoryOptions(offload="idle", ranks=2), DENOISE, (FP8, "--offload layers", DEGREES, LESS)),
        (MemoryOptions(offload="idle", vae_tiling=True), DECODE, (LESS,)),
        (MemoryOptions(offload="layers", quantization="fp8"), LOAD, ()),
        (MemoryOptions(offload="layers"), DENOISE, (FP8, DEGREES, LESS)),
        # What would be refused is not told.
        (MemoryOptions(foreign_parallelism=True, ranks=2), DENOISE, ("--offload idle", FP8, DEGREES, LESS)),
    ],
)
def test_what_helps(options: MemoryOptions, stage: str, expected: tuple[str, ...]) -> None:
    assert remedies(options, stage) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError("no"),
    ],
)
def test_whoever_tells_it(error: Exception) -> None:
    with pytest.raises(NotEnoughMemoryError) as raised, says_what_helps(MemoryOptions(), DECODE):
        raise error
    told = (
        f"memory ran out in decode; less is taken, in this order, with --vae-tiling; --offload idle; {LESS} ({error})"
    )
    assert str(raised.value) == told
    with pytest.raises(NotEnoughMemoryError) as again, says_what_helps(MemoryOptions(), DENOISE):
        raise raised.value
    assert again.value is raised.value
    told_to_clients = job_error(raised.value)
    assert told_to_clients.code == "out_of_memory"
    assert told_to_clients.message == (
        "the server ran out of memory; ask for a smaller or shorter video, or have it started with --vae-tiling or "
        "--offload idle"
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("no such thing"),
        RefusedError("rank 1: OutOfMemoryError: CUDA out of memory", True, ""),
        LostRankError("a rank was lost (rank 1: CUDA out of memory)"),
    ],
)
def test_what_is_something_else_stays(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, says_what_helps(MemoryOptions(), DENOISE):
        raise error
    assert raised.value is error


def _fail(where: str) -> None:
    raise torch.OutOfMemoryError(f"CUDA out of memory, {where}")


def _rank_runs_out_in_decode(rank: int, folder: str) -> None:
    """A job on two ranks, of which the second has no room for its tiles."""
    work = VideoDecoding.work
    flags = ["--ulysses-degree", "2", "--sparse-attn-backend", "reference", "--output", f"{folder}/video.mp4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoDecoding, "work", lambda *given: _fail("tiles") if rank else work(*given))
        with Path(folder, f"rank_{rank}").open("w") as stderr:
            patch.setattr("sys.stderr", stderr)
            assert main([*SMALL, *flags]) == 2


def test_generate_tells_it_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--output", str(tmp_path / "video.mp4")]
    for stage, target, helps in (
        (LOAD, "sp_sparse.generate.models.load_lora", f"--offload idle; {FP8}; --offload layers"),
        (ENCODE, "diffusers.WanPipeline.encode_prompt", "--offload idle; --offload layers"),
        (
            DENOISE,
            "diffusers.WanTransformer3DModel.forward",
            f"--offload idle; {FP8}; --offload layers; {DEGREES}; {LESS}",
        ),
        (DECODE, "diffusers.AutoencoderKLWan.decode", f"--vae-tiling; --offload idle; {LESS}"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, lambda *_, stage=stage, **__: _fail(stage))
            assert main([*SMALL, *places]) == 2
        (told,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
        assert told.endswith(
            f"memory ran out in {stage}; less is taken, in this order, with {helps} (CUDA out of memory, {stage})"
        )


def test_on_several_ranks_it_is_told_whose_it_was(tmp_path: Path) -> None:
    run_ranks(2, _rank_runs_out_in_decode, str(tmp_path))
    told = (tmp_path / "rank_0").read_text()
    assert "rank 1: memory ran out in decode; less is taken, in this order, with --vae-tiling;" in told


def test_fidelity_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr("diffusers.AutoencoderKLWan.decode", lambda *_, **__: _fail(DECODE))
    own = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
    assert fidelity([*own, *SMALL, "--sparse-attn-backend", "reference", "--block-sizes", "8"]) == 2
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "memory ran out in decode; less is taken, in this order, with --vae-tiling; --offload idle;" in told


def test_an_option_that_is_replaced_is_checked_again() -> None:
    options: Any = MemoryOptions(foreign_parallelism=True)
    with pytest.raises(ValueError, match="both hook into every layer"):
        replace(options, offload="layers")
