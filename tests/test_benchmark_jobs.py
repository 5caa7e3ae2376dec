"""`launch/benchmark_jobs.py` on CPUs with tiny models: what is run, written and left out; never how fast."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmarks.jobs import compiling_seconds, measure, parse_arguments, setting_flags
from sp_sparse.generate.models import load_pipeline
from sp_sparse.generate.ranks import Ranks, start_ranks
from tests.ranks import run_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
FEW = ["--", "--device", "cpu", "--num-inference-steps", "2", "--sparse-attn-block-size", "8"]


def _flags(folder: Path, what: str, *settings: str) -> list[str]:
    own = ["--small", "--folder", str(folder), "--output", str(folder / "rows.jsonl")]
    return [what, "--settings", *settings, *own, *FEW]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("setting", "flags"),
    [
        ("dense", ["--sparse-attn-backend", "none"]),
        ("0.3", ["--sparse-attn-backend", "auto", "--sparse-attn-topk", "0.3"]),
        ("quality", ["--sparse-attn-preset", "quality"]),
        ("plain", []),
        ("plain+vae-tiling", ["--vae-tiling"]),
        (
            "0.5+vae-tiling+lora=a,b",
            ["--sparse-attn-backend", "auto", "--sparse-attn-topk", "0.5", "--vae-tiling", "--lora", "a,b"],
        ),
    ],
)
def test_a_setting_stands_for_flags(setting: str, flags: list[str]) -> None:
    assert setting_flags(setting) == flags


def test_the_backend_of_all_jobs_holds_for_densities() -> None:
    assert setting_flags("0.3", ["--sparse-attn-backend", "fa4"]) == ["--sparse-attn-topk", "0.3"]


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        ([21.0, 1, 1, 1, 1, 1], 20.0),
        ([21.0, 1, 1, 1, 1, 9, 1, 1, 1, 1], 28.0),
        ([21.0, 2, 2, 2, 2, 11, 1, 1, 1, 1], 19 + 9.5),
        ([2.0, 2, 2, 2, 2, 1, 1, 1, 1], 0.0),  # dense steps ahead of sparse ones have not compiled
        ([3.0], 0.0),
    ],
)
def test_steps_that_compile_are_told_from_slow_ones(steps: list[float], seconds: float) -> None:
    assert compiling_seconds(steps) == pytest.approx(seconds)


def test_a_row_a_job_and_weights_once_at_a_time(tmp_path: Path) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*given: Any) -> Any:
        assert all(transformer() is None for transformer in loaded)
        pipe = load_pipeline(*given)
        loaded.append(weakref.ref(pipe.transformer))
        return pipe

    arguments = parse_arguments(_flags(tmp_path, "job", "dense", "0.3", "0.3+vae-tiling"), None)
    assert measure(arguments, ALONE, load) == 0
    rows = _rows(tmp_path)
    assert [(row["what"], row["setting"], row["density_asked"]) for row in rows] == [
        ("job", "dense", 1.0),
        ("job", "0.3", 0.3),
        ("job", "0.3+vae-tiling", 0.3),
    ]
    for row in rows:
        assert set(row["seconds"]) == set(row["peak_memory"]) == {"load", "encode", "denoise", "decode", "save"}
        assert (row["gpus"], row["num_inference_steps"], len(row["step_seconds"])) == (1, 2, 2)
        assert row["latents_finite"]
        assert row["versions"]["torch"] == torch.__version__
    assert rows[0]["speedup"] == 1.0
    assert rows[0]["kernels"] is None
    assert rows[1]["kernels"]["reference"] > 0
    assert rows[2]["flags"][-1] == "--vae-tiling"


def test_a_job_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    def load(*given: Any) -> Any:
        if given[0].sparse.topk == 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_pipeline(*given)

    assert measure(parse_arguments(_flags(tmp_path, "memory", "0.5", "0.3"), None), ALONE, load) == 1
    failed, made = _rows(tmp_path)
    assert (failed["what"], failed["error"], failed["speedup"]) == ("memory", "CUDA out of memory", None)
    assert "error" not in made
    assert made["peak_memory"]["denoise"] > 0


def test_flags_that_generate_refuses_are_refused_before_anything_runs(tmp_path: Path) -> None:
    arguments = parse_arguments(_flags(tmp_path, "job", "0.3", "1.5"), None)
    with pytest.raises(ValueError, match=r"setting '1.5': .*topk"):
        measure(arguments, ALONE)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_limit_of_memory_is_for_gpus(tmp_path: Path) -> None:
    flags = _flags(tmp_path, "memory", "plain")
    flags[1:1] = ["--memory-gb", "24"]
    with pytest.raises(ValueError, match="--memory-gb limits a GPU, and the jobs run on CPUs; leave it out"):
        measure(parse_arguments(flags, None), ALONE)


def _rank_measures(rank: int, folder: Path) -> None:
    flags = [*_flags(folder, "memory", "1.0", "0.3"), "--ring-degree", "2"]
    with start_ranks("cpu", 60.0) as ranks:
        assert measure(parse_arguments(flags, None), ranks) == 0


def test_ranks_measure_together(tmp_path: Path) -> None:
    run_ranks(2, _rank_measures, tmp_path)
    rows = _rows(tmp_path)
    assert [(row["gpus"], row["ring"], row["density_asked"]) for row in rows] == [(2, 2, 1.0), (2, 2, 0.3)]
    assert rows[1]["density"] < rows[0]["density"] == 1.0
