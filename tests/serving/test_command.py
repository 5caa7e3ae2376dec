"""`sp_sparse.serve` from the outside: what it refuses, and what a configuration file says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sp_sparse.serve import web
from sp_sparse.serve.__main__ import main
from sp_sparse.serve.arguments import parse_serve_arguments
from sp_sparse.serve.web import check_uvicorn
from tests.processes import PATIENCE_S
from tests.serving.server import RankServer, free_port


@contextmanager
def _launched(server: RankServer) -> Iterator[RankServer]:
    """Started, but not waited for: it will not be ready."""
    server.launch()
    try:
        yield server
    finally:
        server.__exit__()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--api-key", "k", "--no-api-key"], "--no-api-key serves everyone, and --api-key is given; leave out one"),
        (["--host", "0.0.0.0"], "there is no API key; set SP_SPARSE_API_KEY, or give --no-api-key"),
        (["--port", "65536"], r"--port 65536 is outside \[0, 65535\]"),
        (["--api-key", " "], "the API key is empty"),
        (["--max-queue", "0"], "limit queue=0 lets nothing through"),
        (["--keep-hours", "0"], "--keep-hours 0.0 is not above 0"),
        (["--warmup-steps", "-1"], "--warmup-steps -1 is below 0"),
        (["--ulysses-degree", "2"], "2 ranks are asked for, but 1 run"),
        (["--model", "/nowhere"], "--model /nowhere is neither"),
        (["--sparse-attn-backend", "nonesuch"], "unknown sparse attention backend 'nonesuch'"),
        (["--data-dir", f"{__file__}/data"], "cannot be used .*give another --data-dir"),
        (["--host", "203.0.113.1", "--no-api-key"], "cannot be listened on .*choose another --host or --port"),
    ],
)
def test_refusals(tmp_path: Path, flags: list[str], text: str) -> None:
    with _launched(RankServer(tmp_path, 1, *flags)) as server:
        assert server.join() == [2]
        errors = [line for line in server.log.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert re.search(text, errors[0])


def test_a_port_and_a_folder_that_are_taken(tmp_path: Path) -> None:
    with RankServer(tmp_path, 1) as server:
        server.wait_ready()
        for flags, text in (
            (["--port", str(server.port), "--data-dir", str(tmp_path / "other")], "choose another --host or --port"),
            (["--port", str(free_port())], "is used by another server; stop it, or give another --data-dir"),
        ):
            other = RankServer(tmp_path, 1, *flags)
            other.launch()
            assert other.join() == [2]
            assert text in other.log
        assert server.completed()["status"] == "completed"


def test_ranks_with_other_arguments_are_told_without_the_key(tmp_path: Path) -> None:
    flags = ["--ulysses-degree", "2", "--api-key", "secret"]
    with _launched(RankServer(tmp_path, 2, *flags, program=_different_on_each_rank)) as server:
        assert server.join() == [2, 2]
        assert "ranks differ in max_steps (rank 0: 10; rank 1: 11)" in server.log
        assert "secret" not in server.log


def _different_on_each_rank(flags: list[str]) -> int:
    return main([*flags, "--max-steps", str(10 + int(os.environ["RANK"]))])


def test_configuration_file_environment_and_flags_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        "model: tiny-i2v\nmax-queue: 3\nport: 9000\nsparse_attn_backend: reference\nallow_image_urls: true\n"
    )
    monkeypatch.setenv("SP_SPARSE_API_KEY", "secret")
    arguments = parse_serve_arguments(["--config", str(config), "--port", "9001", "--sparse_attn_topk", "0.2"])
    assert (arguments.model, arguments.port, arguments.limits.queue) == ("tiny-i2v", 9001, 3)
    assert (arguments.sparse.backend, arguments.sparse.topk, arguments.sparse.block_size) == (
        "reference",
        0.2,
        (16, 16),
    )
    assert (arguments.api_key, arguments.limits.image_urls) == ("secret", True)
    config.write_text("max_kueue: 3\n")
    with pytest.raises(ValueError, match="unknown keys max_kueue"):
        parse_serve_arguments(["--config", str(config)])


def test_a_folder_is_served_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "wan").mkdir()
    assert parse_serve_arguments(["--model", str(tmp_path / "wan")]).model_name == "wan"
    assert parse_serve_arguments(["--model", "Wan-AI/Wan2.2"]).model_name == "Wan-AI/Wan2.2"
    assert parse_serve_arguments(["--served-model-name", "x"]).model_name == "x"


def test_the_benchmark_compares_server_and_generate(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    small = ["--model", "tiny", "--size", "64x64", "--num-frames", "5", "--num-inference-steps", "2", "--meshes", "1x1"]
    command = [
        sys.executable,
        str(root / "launch" / "benchmark_serving.py"),
        *small,
        "--output",
        str(tmp_path / "x.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "x.jsonl").read_text())
    assert told["same_video"]
    assert len(told["server_s"]) == len(told["generate_s"]) == 2
    assert "same video" in done.stdout


def test_a_uvicorn_without_what_is_used_of_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_uvicorn()

    class Bare(asyncio.Protocol):
        def __init__(self) -> None:
            self.loop = self.transport = None

    monkeypatch.setattr(web, "_KEPT", ((Bare, ("loop", "transport", "cycle")),))
    monkeypatch.delattr(web.H11Protocol, "data_received")
    with pytest.raises(
        ValueError, match=r"uvicorn .* has no .*data_received.*Bare.cycle, by which slow clients .*install"
    ):
        check_uvicorn()


def test_a_folder_of_others_and_a_broken_database_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content, text in (
        ("thesis.tex", b"x", "was not made by this server"),
        ("jobs.sqlite3", b"garbage" * 1000, "is no database, or broken"),
    ):
        (tmp_path / "data" / name).write_bytes(content)
        with _launched(RankServer(tmp_path, 1)) as server:
            assert server.join() == [2]
            assert text in server.log
            assert "Traceback" not in server.log
