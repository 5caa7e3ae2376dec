"""A job of `generate` as results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.benchmark_job import main

JOB = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "3", "--videos-per-prompt", "2"]


def test_a_line_of_time_and_one_of_memory(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    sparse = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.4"]
    for flags in ([], [*sparse, "--offload", "idle", "--vae-tiling"]):
        assert main(["--rows", str(rows), *JOB, *flags, "--output", str(tmp_path / "video.mp4")]) == 0
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["job", "memory"] * 2
    stages = {"load", "encode", "denoise", "decode", "save"}
    for line in lines:
        assert (line["gpus"], line["ulysses"], line["ring"], line["cfg"]) == (1, 1, 1, 1)
        assert (line["num_inference_steps"], line["video"], line["videos"]) == (3, [5, 64, 64], 2)
        assert line["seconds_per_step"] > 0
        assert {"hardware", "versions", "date"} <= set(line)
        if line["what"] == "job":
            assert set(line["seconds"]) == stages
        else:
            assert set(line["peak_memory"]["process_bytes"]) == stages
    assert [(line["density_asked"], line["backend"]) for line in lines] == [(1.0, "none")] * 2 + [
        (0.4, "reference")
    ] * 2
    assert lines[0]["options"]["offload"] == "none"
    assert (lines[3]["options"]["offload"], lines[3]["options"]["vae_tiling"]) == ("idle", True)
    assert lines[3]["options"]["comings"] == {"text_encoder": 1, "transformer": 2, "transformer_2": 2}


def test_a_job_that_fails_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main(["--rows", str(rows), "--height", "65", "--output", str(tmp_path / "video.mp4")]) == 2
    assert "multiples of 16" in capsys.readouterr().err
    assert main(["--rows", str(rows), "--no-such-flag"]) == 2
    assert not rows.exists()
