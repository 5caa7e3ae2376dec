"""`launch/benchmark.py` on CPUs in miniature: what is measured, written, skipped, refused and drawn; never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.benchmarks.arguments import TransformerArguments, parse_arguments
from launch.benchmarks.command import main
from launch.benchmarks.gpu_trace import digest, read_trace
from launch.benchmarks.results import Measurement
from launch.benchmarks.session import Session
from launch.benchmarks.timing import Times
from launch.benchmarks.transformer import measure_transformer
from sp_sparse.generate.ranks import Ranks
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
KEYS = [
    "what", "gpus", "ulysses", "ring", "sequence", "heads", "head_dim", "density", "kernel", "ms_median", "ms_min",
    "ms_max", "tflops_attended", "baseline", "speedup", "hardware", "versions", "date",
]  # fmt: skip
SMALL = ["--device", "cpu", "--dtype", "float32", "--heads", "4", "--head-dim", "16", "--block-size", "16x16"]
SMALL += ["--repeat", "2", "--warmup", "1"]
ATTENTION = ["attention", *SMALL, "--grids", "4x8x8"]
TRANSFORMER = ["transformer", *SMALL, "--videos", "4x8x8", "--layers", "2"]
TRANSFORMER += ["--ffn-dim", "64", "--text-tokens", "8", "--text-dim", "32"]


def _read(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert row["hardware"].startswith("CPU")
        assert row["versions"]["torch"] == torch.__version__
        assert (row["baseline"] is None) == (row["speedup"] is None)
    return rows


def _modes(rows: list[dict[str, Any]]) -> list[tuple[int, int, str, float, str | None]]:
    return [(r["ulysses"], r["ring"], r["kernel"], round(r["density"], 1), r["baseline"]) for r in rows]


def _error(capsys: pytest.CaptureFixture[str], *flags: str, what: str | None = None) -> str:
    assert main((what, *flags[1:]) if what else flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def _rank_measures(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


def test_attention_on_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results.jsonl"
    assert main([*ATTENTION, "--densities", "0.5", "1.0", "--output", str(output)]) == 0
    rows = _read(output)
    assert _modes(rows) == [
        (1, 1, "sdpa_dense", 1.0, None),
        (1, 1, "dense", 1.0, "sdpa_dense"),
        (1, 1, "reference", 0.5, "sdpa_dense"),
    ]
    sparse = rows[2]
    assert sparse["sequence"] == 256
    assert sparse["speedup"] == pytest.approx(rows[0]["ms_median"] / sparse["ms_median"], abs=1e-3)
    parts = sum(sparse[f"ms_{part}"] for part in ("kernel", "means", "scores", "topk", "split", "remainder", "other"))
    assert parts == pytest.approx(sparse["ms_median"], abs=1e-3)
    assert sparse["ms_split"] == 0.0 < sparse["ms_split_in_two"]
    overhead = 100 * (sparse["ms_median"] - sparse["ms_kernel"]) / sparse["ms_kernel"]
    assert sparse["overhead_percent"] == pytest.approx(overhead, abs=0.1)
    assert sparse["tflops_attended"] is not None
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1


def test_a_remainder_is_measured_beside_the_layer_without(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    flags = [*ATTENTION, "--densities", "0.3", "--remainders", "drop", "linear"]
    run_ranks(2, _rank_measures, [*flags, "--output", str(output)])
    rows = [r for r in _read(output) if r["kernel"].startswith("reference")]
    assert [(r["ulysses"], r["ring"], r["kernel"], r.get("remainder")) for r in rows] == [
        (u, r, *kind)
        for u, r in ((1, 1), (2, 1), (1, 2))
        for kind in (("reference", None), ("reference+linear", "linear"))
    ]
    assert all((r["ms_remainder"] > 0) == ("remainder" in r) for r in rows)
    assert rows[3]["parallel_efficiency"] == pytest.approx(rows[1]["ms_median"] / (2 * rows[3]["ms_median"]), abs=1e-3)


def test_attention_on_four_ranks(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    flags = [*ATTENTION, "--densities", "0.3", "--kv-exchanges", "ring", "all_gather"]
    run_ranks(4, _rank_measures, [*flags, "--output", str(output)])
    rows = _read(output)
    assert [r["ring"] for r in rows if r.get("kv_exchange") == "all_gather"] == [2, 4]
    rows = [r for r in rows if r.get("kv_exchange") != "all_gather"]
    assert [(r["ulysses"], r["ring"], r["baseline"]) for r in rows if r["kernel"] == "reference"] == [
        (1, 1, "sdpa_dense"),
        (4, 1, "dense 4x1"),
        (2, 2, "dense 2x2"),
        (1, 4, "dense 1x4"),
    ]
    one, hybrid = (next(r for r in rows if r["ring"] == n and r["kernel"] == "reference") for n in (1, 2))
    efficiency = one["ms_median"] / (4 * hybrid["ms_median"])
    assert hybrid["parallel_efficiency"] == pytest.approx(efficiency, abs=1e-3)
    assert hybrid["ms_split"] > 0
    assert one["density"] == hybrid["density"]


def test_transformer_on_one_rank_eager_and_compiled(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    flags = [*TRANSFORMER, "--densities", "1.0", "0.3", "--modes", "eager", "compiled", "--compile-backend", "eager"]
    assert main([*flags, "--output", str(output)]) == 0
    rows = _read(output)
    once = [
        (1, 1, "native", 1.0, None),
        (1, 1, "dense", 1.0, "diffusers 1x1"),
        (1, 1, "reference", 0.3, "diffusers 1x1"),
    ]
    assert _modes(rows) == once * 2
    assert [row["compiled"] for row in rows] == [False] * 3 + [True] * 3
    assert rows[2]["ms_per_layer"] == pytest.approx(rows[2]["ms_median"] / 2, abs=1e-3)
    assert rows[2]["sequence"] == 64
    assert rows[2]["tflops_attended"] is None


def test_transformer_on_two_ranks(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run_ranks(2, _rank_measures, [*TRANSFORMER, "--densities", "0.3", "--meshes", "1x2", "--output", str(output)])
    # diffusers' own parallelism does not run on CPUs, so nothing dense on two ranks is there to compare with.
    assert _modes(_read(output)) == [
        (1, 1, "native", 1.0, None),
        (1, 1, "reference", 0.3, "diffusers 1x1"),
        (1, 2, "reference", 0.3, None),
    ]


def _rank_measures_as_on_gpus(rank: int, flags: list[str]) -> None:
    """With diffusers' own Ulysses; its ring needs an attention that returns the LSE, which no CPU has."""
    import launch.benchmarks.transformer as module

    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
    module.why_no_diffusers_parallelism = lambda device: None
    arguments = parse_arguments(flags)
    assert isinstance(arguments, TransformerArguments)
    with torch.no_grad():
        session = Session(Ranks(rank, 2, torch.device("cpu")), arguments.output, None)
        measure_transformer(session, arguments)
        assert session.finish() == 1


def test_sparse_is_compared_with_diffusers_parallelism_and_what_fails_is_left_out(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run_ranks(2, _rank_measures_as_on_gpus, [*TRANSFORMER, "--densities", "0.3", "--output", str(output)])
    rows = _read(output)
    assert _modes(rows) == [
        (2, 1, "native", 1.0, None),
        (1, 1, "native", 1.0, None),
        (1, 1, "reference", 0.3, "diffusers 1x1"),
        (2, 1, "reference", 0.3, "diffusers 2x1"),
        (1, 2, "reference", 0.3, "diffusers 2x1"),
    ]
    assert rows[4]["speedup"] == pytest.approx(rows[0]["ms_median"] / rows[4]["ms_median"], abs=1e-3)


def test_what_agreeing_costs(tmp_path: Path) -> None:
    """Loops with and without agreement on every mesh of two ranks, in one table."""
    out = tmp_path / "agreement.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--small", "--layers", "1", "--latents", "3", "16", "16", "--times", "2", "--repeat", "1"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "launch" / "benchmark_agreement.py"), *flags, "--output", str(out)],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    meshes = [(row["loop"], row["cfg"], row["ulysses"], row["ring"]) for row in rows]
    pairs = [(kind, 1, *degrees) for kind in ("transformer", "pipeline") for degrees in ((1, 2), (2, 1))]
    assert meshes == [*pairs, ("halves", 2, 1, 1)]
    assert all(row["ms_alone"] > 0 for row in rows)
    assert [line.split()[:4] for line in done.stdout.splitlines()[-5:]] == [[str(x) for x in mesh] for mesh in meshes]


def test_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*ATTENTION, "--densities", "0.5", "--meshes", "2x1", "--output", str(tmp_path / "results.jsonl")]
    job = subprocess.run(
        [*torchrun, str(ROOT / "launch" / "benchmark.py"), *flags],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert len(_read(tmp_path / "results.jsonl")) == len(job.stdout.splitlines()) - 1 == 5


def test_what_the_time_limit_skips_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.jsonl"
    assert main([*ATTENTION, "--densities", "0.5", "--time-limit-s", "0", "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "skipped, over --time-limit-s 0: sdpa_dense 256 tokens",
        "skipped, over --time-limit-s 0: layer 1x1 auto 256 tokens, density 1",
        "skipped, over --time-limit-s 0: layer 1x1 auto 256 tokens, density 0.5",
        "nothing was measured",
    ]
    assert not output.exists()


def test_every_measurement_is_in_the_file_before_the_next_starts(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    session = Session(Ranks(0, 1, torch.device("cpu")), output, None)
    times = Times(2.0, 1.0, 3.0, None)
    measurement = Measurement("attention", 1, 1, 1, 64, 4, 16, 1.0, "dense", times, None, None, None)
    for count in (1, 2):
        assert session.measure("first", lambda: measurement) is measurement
        assert len(_read(output)) == count


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.jsonl"
    assert main([*ATTENTION, "--densities", "0.5", "--backends", "triton", "auto", "--output", str(output)]) == 1
    assert [row["kernel"] for row in _read(output)] == ["sdpa_dense", "dense", "reference"]
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("left out: layer 1x1 triton 256 tokens, density 0.5: rank 0: ValueError: ")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "required: command"),
        (["attention", "--densities", "0"], "density 0 is not in (0, 1]; give a share such as 0.3"),
        (["attention", "--grids", "21x30"], "'21x30' is not 3 whole numbers above 0; write it as 21x30x52"),
        (["attention", "--repeat", "0"], "'0' is not a whole number above 0; give 1 or more"),
        (["transformer", "--videos", "4x9x8"], "give an even height and width"),
        ([*ATTENTION, "--meshes", "2x2"], "--meshes 2x2 needs 4 ranks, but 1 run; start `torchrun --nproc-per-node 4`"),
        ([*ATTENTION, "--backends", "magic"], "unknown sparse attention backend 'magic'; use one of auto"),
        ([*ATTENTION, "--backends", "none"], "leaves nothing to measure; name a kernel, or use auto"),
        (["plot", "none.jsonl", "--output-dir", "."], "none.jsonl"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    assert text in _error(capsys, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_timeline_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run this on a machine with some" in _error(capsys, *ATTENTION, what="timeline")


# A ring hop of 4 ms beside 5 ms of attention, 1 of it exposed; stream 7 then merges after a pause of 1.
_TRACE = [
    ("kernel", 0, 1, 7, "nccl of the call before"),
    ("kernel", 5, 1, 7, "spin_kernel(long)"),
    ("kernel", 7, 1, 7, "mean_blocks"),
    ("kernel", 7, 4, 21, "ncclDevKernel_SendRecv(x)"),
    ("kernel", 9, 5, 7, "kernel_cutlass_flash_fwd"),
    ("gpu_memcpy", 14, 1, 7, "Memcpy DtoD"),
    ("cpu_op", 14, 9, 0, "aten::empty"),
    ("kernel", 16, 1, 7, "merge_rows"),
]


def _trace() -> list[dict[str, Any]]:
    return [
        {"cat": cat, "ts": 1e3 * ts, "dur": 1e3 * dur, "name": name, "args": {"stream": stream}}
        for cat, ts, dur, stream, name in _TRACE
    ]


def test_a_timeline_is_read_from_a_trace() -> None:
    works = read_trace(reversed(_trace()), 1)
    assert [(w.rank, w.stream, w.part, w.start, w.end) for w in works] == [
        (1, 7, "selection", 1.0, 2.0),
        (1, 21, "exchange", 1.0, 5.0),
        (1, 7, "attention", 3.0, 8.0),
        (1, 7, "copies", 8.0, 9.0),
        (1, 7, "merge", 10.0, 11.0),
    ]
    parts = {"exchange": 4.0, "merge": 1.0, "selection": 1.0, "attention": 5.0, "copies": 1.0}
    expected = {**{f"ms_{part}": ms for part, ms in parts.items()}, "ms_exposed": 2.0, "ms_idle": 2.0}
    assert digest(works) == expected
    longer = [replace(work, rank=0, end=work.end + 0.5) for work in works]
    assert digest([*works, *longer])["ms_merge"] == 1.5
    with pytest.raises(ValueError, match="saw no GPU work"):
        read_trace([], 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_kernels_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run this on a machine with one" in _error(capsys, "kernels", "--densities", "0.3")
    with pytest.raises(SystemExit, match="0"):
        main(["kernels", "--help"])
    assert "--kernels" in capsys.readouterr().out


def _result(density: float, ring: int, **changed: Any) -> dict[str, Any]:
    row = {
        "what": "attention", "gpus": ring, "ulysses": 1, "ring": ring, "sequence": 32760, "heads": 40, "head_dim": 128,
        "density": density, "kernel": "triton", "ms_median": 40 * density, "ms_min": 1.0, "ms_max": 50.0,
        "tflops_attended": 500.0, "baseline": "cudnn_dense", "speedup": 0.9 / density, "hardware": "H", "versions": {},
        "date": "2026-11-22", "overhead_percent": 7.0,
    }  # fmt: skip
    parts = {"kernel": 0.9, "means": 0.02, "scores": 0.02, "topk": 0.03, "split": 0.0, "other": 0.03}
    return {**row, **{f"ms_{name}": share * 40 * density for name, share in parts.items()}, **changed}


def _timeline_rows() -> list[list[object]]:
    return [list(vars(work).values()) for rank in (0, 1) for work in read_trace(_trace(), rank)]


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [_result(0.3, 1, implementation="layer", ms_median=12.0)]
    rows += [_result(0.3, 2, implementation="layer", ms_median=8.0, kv_exchange=e) for e in ("ring", "all_gather")]
    rows += [_result(0.5, 2, implementation="layer"), _result(1.0, 1, implementation="dense", ms_median=40.0)]
    hybrid = {"implementation": "layer", "ms_median": 4.0, "ulysses": 2, "speedup": None}
    rows += [{**_result(0.3, 2, **hybrid), "gpus": 4}]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["scaling", str(results), "--output-dir", str(tmp_path / "plots")]) == 0
    names = ["scaling.md", "scaling_attention_32760.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    table = (tmp_path / "plots" / "scaling.md").read_text().splitlines()
    assert table[2:] == [
        "| attention | 32760 | triton | 0.30 | 2 | U1×R2 | 8.00 | 1.50 | 0.75 | 3.00 |",
        "| attention | 32760 | triton | 0.30 | 4 | U2×R2 | 4.00 | 3.00 | 0.75 | – |",
    ]
    # Each file is compared with its own single GPU; of equal measurements the later file's counts, wherever it stands.
    again = tmp_path / "again.jsonl"
    rows = [_result(0.5, ring, implementation="layer", ms_median=30.0 / ring) for ring in (1, 2)]
    rows += [_result(0.3, ring, implementation="layer", ms_median=10.0, kv_exchange="ring") for ring in (1, 2)]
    again.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["scaling", str(results), str(again), "--output-dir", str(tmp_path / "plots")]) == 0
    both = (tmp_path / "plots" / "scaling.md").read_text().splitlines()[2:]
    assert [tuple(line.split(" | ")[i] for i in (3, 4, 7)) for line in both] == [
        ("0.50", "2", "2.00"),
        ("0.30", "2", "1.00"),
        ("0.30", "4", "3.00"),
    ]
    results.write_text(json.dumps(rows[0]) + "\n")
    assert "measured both on one GPU and on several" in _error(capsys, "scaling", str(results), "--output-dir", ".")


def test_scaling_script(tmp_path: Path) -> None:
    """The commands of `launch/scaling.sh` on two gloo ranks."""
    pytest.importorskip("matplotlib")
    environment = {"PYTHON": sys.executable, "OUTPUT": str(tmp_path), "REPEAT": "1", "DENSITIES": "0.3"}
    job = subprocess.run(
        ["bash", str(ROOT / "launch" / "scaling.sh"), "2"],
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    (invariant,) = tmp_path.glob("*_x2_invariant.jsonl")
    rows = [json.loads(line) for line in invariant.read_text().splitlines()]
    assert [(row["ulysses"], row["ring"], row["kv_exchange"], row["masks_identical"]) for row in rows] == [
        (1, 2, "ring", True),
        (1, 2, "all_gather", True),
        (2, 1, None, True),
    ]
    layers = [row for path in tmp_path.glob("*_x2_attention.jsonl") for row in _read(path)]
    assert {row["kv_exchange"] for row in layers if row["ring"] == 2 and row["kernel"] != "dense"} == {
        "ring",
        "all_gather",
    }
    table = (tmp_path / "plots" / "scaling.md").read_text()
    assert [line.split(" | ")[5] for line in table.splitlines()[2:]] == ["U2×R1", "U1×R2"] * 3


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [_result(density, ring) for ring in (1, 2) for density in (0.7, 0.3, 0.1)]
    forward = {"what": "transformer", "compiled": True}
    rows += [
        {
            key: value
            for key, value in _result(0.3, 1, **forward).items()
            if key not in ("ms_kernel", "overhead_percent")
        },
        _result(1.0, 1, speedup=None, baseline=None),
        _result(0.3, 2, speedup=None, baseline=None, what="timeline", timeline=_timeline_rows()),
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plot", str(results), "--output-dir", str(tmp_path / "plots")]) == 0
    names = ["speedup_attention_32760.png", "parts_attention_32760.png", "speedup_transformer_32760.png"]
    names.append("timeline_32760_1x2_triton_0.30.png")
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    results.write_text('{"what": "kernels"}\n')
    error = _error(capsys, "plot", str(results), "--output-dir", str(tmp_path))
    assert "line 1 has no gpus, ulysses" in error
