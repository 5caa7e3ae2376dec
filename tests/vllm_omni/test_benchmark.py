"""benchmark_vllm_omni.py in miniature, on forked ranks: it checks, it measures, and it notices what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from launch.benchmarks import omni
from launch.benchmarks.omni import main
from tests.ranks import run_ranks

TINY = [
    *("--videos", "4x12x18", "3x10x10", "--layers", "2", "--heads", "4", "--head-dim", "32", "--ffn-dim", "64"),
    *("--text-tokens", "7", "--text-dim", "16", "--dtype", "float32", "--device", "cpu", "--block-size", "16x16"),
    *("--sparsities", "0.6", "--tolerance", "1e-5", "--model-tolerance", "1e-5", "--warmup", "1", "--repeat", "1"),
]


def _run(rank: int, flags: list[str], status: int) -> None:
    assert main([*TINY, *flags]) == status


def test_meshes_against_one_rank(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run_ranks(2, _run, ["--meshes", "2x1", "--output", str(output)], 0)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    told = [(row["ulysses"], row["sequence"], row["implementation"], row["kernel"]) for row in rows]
    ways = [("vllm-omni", "SDPA"), ("SP_SPARSE", "reference")]
    assert told == [(ulysses, tokens, *way) for ulysses in (1, 2) for way in ways for tokens in (216, 75)]
    assert all(row["masks_identical"] and row["model_error"] < 1e-5 for row in rows if "masks_identical" in row)
    assert sum("masks_identical" in row for row in rows) == 2
    assert sum("model_error" in row for row in rows) == 4
    assert all((row["speedup"] is None) == (row["implementation"] == "vllm-omni") for row in rows)


def _run_wrong(rank: int, flags: list[str]) -> None:
    with mock.patch.object(omni, "relative_error", return_value=0.5):
        _run(rank, flags, 1)


def test_a_wrong_output_fails() -> None:
    run_ranks(2, _run_wrong, ["--meshes", "1x2", "--videos", "4x12x18"])


def test_one_rank() -> None:
    run_ranks(1, _run, ["--videos", "4x12x18"], 0)
