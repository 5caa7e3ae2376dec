"""A video served by vllm-omni, sparse and dense: a `vllm serve --omni` for each, OpenAI's client, and what the logs tell."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.benchmarks.omni_log import check_every_layer, expert_layers, read_log

_LOG_LINES = 40
_STOP_SECONDS = 60


@dataclass(frozen=True)
class ServedVideo:
    """What is served, how, and what is asked for.

    Attributes:
        model: folder of a diffusers pipeline.
        ulysses, ring: degrees of vllm-omni's sequence parallelism.
        block_sparse: settings of SP_SPARSE, of one density for all layers and steps.
        server: the command that stands for `vllm`.
        more: further flags of `vllm serve`, for both servers.
        video: fields of the request beside `prompt` and `size`: those of vllm-omni's POST /v1/videos.
        timeout_s: seconds for a server to start, and for a video.
    """

    model: Path
    prompt: str
    size: str
    video: Mapping[str, Any]
    ulysses: int = 1
    ring: int = 1
    block_sparse: Mapping[str, Any] | None = None
    server: str = "vllm"
    more: tuple[str, ...] = ()
    timeout_s: float = 1800.0

    def command(self, sparse: bool, port: int) -> list[str]:
        """The server's."""
        attention = {"per_role": {"self": {"backend": "SP_SPARSE", "block_sparse": dict(self.block_sparse or {})}}}
        flags = ["--diffusion-attention-config", json.dumps(attention)] if sparse else []
        mesh = ["--ulysses-degree", str(self.ulysses), "--ring-degree", str(self.ring)]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return [*shlex.split(self.server), "serve", str(self.model), "--omni", *where, *mesh, *flags, *self.more]


def serve_both(asked: ServedVideo, folder: Path) -> dict[str, Any]:
    """The video by SP_SPARSE and, from a server of its own, by vllm-omni's dense attention, and what the logs tell.

    Keeps `sparse.mp4`, `dense.mp4` and the servers' logs in the folder.

    Raises:
        ValueError: the log does not tell that every self-attention was sparse, or that none was in the dense server.
        RuntimeError: a server that ends, fails or takes too long, with the end of its log.
    """
    layers = expert_layers(asked.model)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"model": str(asked.model), "layers": list(layers)}
    for name in ("sparse", "dense"):
        log, video = folder / f"{name}.log", folder / f"{name}.mp4"
        with _server(asked, name == "sparse", log) as url:
            before = log.stat().st_size
            seconds = _make_video(asked, url, video, log)
        # Lines may come while the client already has its video, so the log is read when the server has ended.
        told = read_log(log.read_bytes()[before:].decode("utf-8", "replace"))
        if name == "sparse":
            check_every_layer(told, layers, asked.ulysses * asked.ring)
        elif told:
            raise ValueError(
                f"{len(told)} lines of {log} tell of SP_SPARSE, expected none: the server is the dense one"
            )
        report[name] = {"video": str(video), "seconds": round(seconds, 3), "log": str(log)}
        report[name] |= {
            "sparse_layers": len({line.layer for line in told}),
            "ranks": len({line.rank for line in told}),
        }
        report[name] |= {"kernels": sorted({line.how for line in told})}
        report[name] |= {"density": sorted({line.density for line in told}) or [1.0]}
        report[name] |= {"tokens": sorted({line.video for line in told})}
    return report


def _make_video(asked: ServedVideo, url: str, path: Path, log: Path) -> float:
    """Seconds from the request until the video was there; it is written to `path`."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=asked.timeout_s, max_retries=0) as client:
        start = time.perf_counter()
        size: Any = asked.size  # OpenAI's models have four
        made = client.videos.create(prompt=asked.prompt, size=size, extra_body=dict(asked.video))
        while made.status in ("queued", "in_progress"):
            if time.perf_counter() - start > asked.timeout_s:
                raise RuntimeError(f"no video after {asked.timeout_s:g} s, see {log}; give a longer --timeout-s")
            time.sleep(0.2)
            made = client.videos.retrieve(made.id)
        if made.status != "completed":
            raise RuntimeError(f"the video is {made.status} ({made.error}):\n{_tail(log)}")
        seconds = time.perf_counter() - start
        path.write_bytes(client.videos.download_content(made.id).read())
    return seconds


@contextmanager
def _server(asked: ServedVideo, sparse: bool, log: Path) -> Iterator[str]:
    """Its address, once it is ready; it ends with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = asked.command(sparse, port)
    # All layers but the first tell what they did at this level.
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_COLOR": "0"}
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        except FileNotFoundError as error:
            raise RuntimeError(f'{command[0]} is not there; pip install "sp-sparse[vllm]"') from error
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, asked.timeout_s, log)
        yield url
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float, log: Path) -> None:
    import httpx

    end = time.monotonic() + seconds
    with httpx.Client(trust_env=False) as http:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}:\n{_tail(log)}")
            if time.monotonic() > end:
                raise RuntimeError(
                    f"the server was not ready after {seconds:g} s, give a longer --timeout-s:\n{_tail(log)}"
                )
            try:
                if http.get(f"{url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and its workers, by force if they do not go."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it may have gone before its workers
    process.wait()


def _tail(log: Path) -> str:
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])
