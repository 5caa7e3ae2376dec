"""What the server costs over `sp_sparse.generate`: the same videos through both, on every mesh; a table and JSON lines.

Run it plainly: it starts `torchrun` itself, first for the server, which makes two videos one after the other, then for
`sp_sparse.generate`, which makes the same video after one that warms it up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.results import environment  # noqa: E402
from sp_sparse.generate.arguments import RANDOM_A14B  # noqa: E402
from sp_sparse.generate.files import decoded_pixels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
_JOBS = 2
_COLUMNS = ("UxR", "server s", "client s", "generate s", "server %", "client %", "denoise %", "s/step", "same video")


@dataclass(frozen=True)
class Video:
    """One video and how long it took: in all, as its client saw it, and its denoising alone."""

    content: bytes
    seconds: float
    client_seconds: float
    denoise_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if a video differs."""
    arguments = _parse(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for mesh in arguments.meshes:
            ulysses, ring = map(int, mesh.split("x"))
            flags = [*_model_flags(arguments), "--ulysses-degree", str(ulysses), "--ring-degree", str(ring)]
            place = Path(folder, mesh)
            place.mkdir()
            served = _serve(arguments, ulysses * ring, flags, place)
            generated = _generate(arguments, ulysses * ring, flags, place)
            results.append(_compare(arguments, mesh, served, generated))
            line = json.dumps(results[-1])
            print(line, flush=True)
            if arguments.output is not None:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    _print_table(results)
    return 0 if all(result["same_video"] for result in results) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["2x1", "1x2"], help="ULYSSESxRING, such as 2x1")
    parser.add_argument("--model", default="a14b-random")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT")
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--num-inference-steps", type=int, default=40)
    parser.add_argument("--sparse-attn-topk", type=float, default=0.3)
    parser.add_argument("--sparse-attn-backend", default="auto")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds that a start or a video may take")
    parser.add_argument("--output", type=Path, help="file that JSON lines are added to")
    return parser.parse_args(argv)


def _model_flags(arguments: argparse.Namespace) -> list[str]:
    sparse = [
        "--sparse-attn-backend",
        arguments.sparse_attn_backend,
        "--sparse-attn-topk",
        str(arguments.sparse_attn_topk),
    ]
    layers = ["--layers", str(arguments.layers)] if arguments.model == RANDOM_A14B else []
    return ["--model", arguments.model, *layers, *sparse]


def _serve(arguments: argparse.Namespace, ranks: int, flags: list[str], folder: Path) -> list[Video]:
    """The videos as the server makes them, after its own warm-up."""
    port = _free_port()
    server = [*flags, "--port", str(port), "--data-dir", str(folder / "data")]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=arguments.limit_s, trust_env=False)
    with _torchrun(ranks, "serve.py", server, folder / "serve.log") as process, client as http:
        _wait(lambda: _is_ready(http, process), arguments.limit_s, folder / "serve.log")
        return [_served_video(arguments, http, folder) for _ in range(_JOBS)]


def _served_video(arguments: argparse.Namespace, http: httpx.Client, folder: Path) -> Video:
    asked = {
        "prompt": "a cat walks on the grass",
        "size": arguments.size,
        "num_frames": arguments.num_frames,
        "num_inference_steps": arguments.num_inference_steps,
        "seed": 0,
    }
    start = time.perf_counter()
    # One request for all: a client that polls takes its share of the server's process.
    answer = http.post("/v1/videos/sync", json=asked, timeout=arguments.limit_s)
    client_seconds = time.perf_counter() - start
    if answer.status_code != 200:
        raise RuntimeError(f"the server failed: {answer.text}\n{_tail(folder / 'serve.log')}")
    stages = json.loads(answer.headers["X-Stage-Durations"])
    return Video(answer.content, float(answer.headers["X-Inference-Time-S"]), client_seconds, stages["denoise"])


def _generate(arguments: argparse.Namespace, ranks: int, flags: list[str], folder: Path) -> list[Video]:
    """The videos as `sp_sparse.generate` makes them, without the first, which warms up."""
    prompts, video = folder / "prompts.txt", folder / "video.mp4"
    prompts.write_text("a cat walks on the grass\n" * (_JOBS + 1), encoding="utf-8")
    width, height = arguments.size.split("x")
    size = ["--width", width, "--height", height, "--num-frames", str(arguments.num_frames)]
    steps = ["--num-inference-steps", str(arguments.num_inference_steps), "--seed", "0"]
    job = [*flags, *size, *steps, "--prompt-file", str(prompts), "--output", str(video)]
    with _torchrun(ranks, "generate.py", job, folder / "generate.log") as process:
        if process.wait(arguments.limit_s * (_JOBS + 2)) != 0:
            raise RuntimeError(f"generate failed:\n{_tail(folder / 'generate.log')}")
    report = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    encode = report["seconds"]["encode"] / len(report["videos"])
    videos = []
    for told in report["videos"][1:]:
        seconds = encode + sum(told["seconds"].values())
        videos.append(Video(Path(told["output"]).read_bytes(), seconds, seconds, told["seconds"]["denoise"]))
    return videos


def _compare(arguments: argparse.Namespace, mesh: str, served: list[Video], generated: list[Video]) -> dict[str, Any]:
    def percent_over(name: str) -> float:
        ours, theirs = (median(getattr(video, name) for video in videos) for videos in (served, generated))
        return 100 * (ours / theirs - 1)

    frames = [np.frombuffer(decoded_pixels(video.content), np.uint8) for video in (*served, *generated)]
    apart = max(int(np.abs(one.astype(int) - frames[-1]).max()) for one in frames)
    width, height = map(int, arguments.size.split("x"))
    return {
        "what": "serving",
        "mesh": mesh,
        "model": arguments.model,
        "layers": arguments.layers,
        "video": [arguments.num_frames, height, width],
        "steps": arguments.num_inference_steps,
        "server_s": [video.seconds for video in served],
        "client_s": [video.client_seconds for video in served],
        "generate_s": [video.seconds for video in generated],
        "server_denoise_s": [video.denoise_seconds for video in served],
        "generate_denoise_s": [video.denoise_seconds for video in generated],
        "overhead_percent": percent_over("seconds"),
        "client_overhead_percent": percent_over("client_seconds"),
        "denoise_overhead_percent": percent_over("denoise_seconds"),
        "same_file": len({video.content for video in (*served, *generated)}) == 1,
        "same_video": apart == 0,
        "max_frame_difference_of_255": apart,
        **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def _print_table(results: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for result in results:
        overheads = ("overhead_percent", "client_overhead_percent", "denoise_overhead_percent")
        rows.append(
            (
                result["mesh"],
                *(f"{median(result[name]):.3f}" for name in ("server_s", "client_s", "generate_s")),
                *(f"{result[name]:+.2f}" for name in overheads),
                f"{median(result['server_denoise_s']) / result['steps']:.4f}",
                "yes" if result["same_video"] else f"apart by {result['max_frame_difference_of_255']}",
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _torchrun(ranks: int, script: str, flags: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job that is ended, with all its ranks, when the context is left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*torchrun, str(ROOT / "launch" / script), *flags],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError("the server ended")
    try:
        return http.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def _wait(condition: Any, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    try:
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError(f"nothing came of it within {seconds:g} s")
            time.sleep(0.02)
    except RuntimeError as error:
        raise RuntimeError(f"{error}:\n{_tail(log)}") from error


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
