"""Servers for tests: of the tiny model on forked gloo ranks, driven over HTTP like any other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist

from sp_sparse.serve.__main__ import main
from tests.processes import PATIENCE_S, wait_for

TINY = ["--model", "tiny"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client:
    """What a client does, in one line each."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False, **options)

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a cat", **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def get(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def status(self, job_id: str) -> str:
        return str(self.get(job_id)["status"])

    def ended(self, job_id: str) -> dict[str, Any]:
        wait_for(lambda: self.status(job_id) in ("completed", "failed"), f"the end of {job_id}")
        return self.get(job_id)

    def completed(self, **fields: Any) -> dict[str, Any]:
        """Create a job and wait for its good end."""
        job = self.ended(self.create(**fields)["id"])
        assert job["status"] == "completed", job
        return job

    def content(self, job_id: str) -> bytes:
        answer = self.http.get(f"/v1/videos/{job_id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def is_ready(self) -> bool:
        try:
            return self.http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        wait_for(self.is_ready, "the server to be ready")


class RankServer(Client):
    """`sp_sparse.serve` on forked ranks; everything is ended when the context is left."""

    def __init__(self, folder: Path, world: int, *flags: str, program: Callable[[list[str]], int] = main) -> None:
        self.folder, self.world, self.port, self._program = folder, world, free_port(), program
        super().__init__(f"http://127.0.0.1:{self.port}")
        self._flags = ["--port", str(self.port), "--data-dir", str(folder / "data"), *TINY, *SPARSE, *flags]
        self.processes: list[BaseProcess] = []

    def __enter__(self) -> RankServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for rank in range(len(self.processes)):
            self.signal(rank, signal.SIGKILL)
        self.join()
        self.http.close()

    def start(self) -> None:
        """Start all ranks, and wait until they are ready."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start all ranks."""
        context = multiprocessing.get_context("fork")
        store = tempfile.mktemp(dir=self.folder, prefix="store-")
        self.processes = [
            context.Process(
                target=_rank_main, args=(rank, self.world, store, self._program, self._flags, str(self.log_path))
            )
            for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].is_alive():
            os.kill(pid, number)

    def join(self) -> list[int | None]:
        """The exit codes, once all ranks have ended."""
        for process in self.processes:
            process.join(PATIENCE_S)
        codes = [process.exitcode for process in self.processes]
        self.processes = []
        return codes

    def stop(self) -> list[int | None]:
        """SIGTERM to all ranks, as torchrun sends it."""
        for rank in range(self.world):
            self.signal(rank, signal.SIGTERM)
        return self.join()


def _rank_main(
    rank: int, world: int, store: str, program: Callable[[list[str]], int], flags: list[str], log: str
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # What pytest put in their place writes elsewhere.
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    logging.getLogger().handlers.clear()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE_S)
        )
    status = program(flags)
    os._exit(status)
