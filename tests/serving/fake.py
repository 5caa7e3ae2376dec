"""A backend without a model, whose behaviour the prompt decides; and a server of it within this process."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sp_sparse.generate.files import whole_file
from sp_sparse.serve.api import create_app
from sp_sparse.serve.backend import JobParameters, Measured, ModelCard, NotFiniteError
from sp_sparse.serve.control import Control
from sp_sparse.serve.engine import Engine
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.runner import Bounds, JobRunner
from sp_sparse.serve.service import Service
from sp_sparse.serve.store import JobStore
from sp_sparse.serve.watchdog import Watchdog
from sp_sparse.serve.web import WebServer, listen
from tests.processes import PATIENCE_S
from tests.serving.server import Client

CARD = ModelCard(
    name="fake/model",
    prompt="a fox",
    height=64,
    width=64,
    num_frames=5,
    fps=8,
    num_inference_steps=3,
    guidance_scale=3.0,
    pixel_multiple=16,
    frame_multiple=4,
    image="optional",
    two_experts=True,
    sparse_backend="reference",
    sparse_topk=0.3,
    sparse_schedule="conservative",
)


class FakeBackend:
    """Prompts are words: `fail_in=denoise on=1 with=oom`, `hang_in=decode on=0`, `slow_in=encode slow_on=1` (3 s), `wait`
    (for the gate, at every step)."""

    def __init__(self, rank: int = 0, card: ModelCard = CARD) -> None:
        self.rank, self.card = rank, card
        self.gate = threading.Semaphore(0)
        self.recovered = 0
        self.after_save: Callable[[], None] = lambda: None

    def check(self, job: JobParameters) -> None:
        if job.prompt == "refuse":
            raise ValueError("this prompt is refused; use another")

    def load(self) -> None:
        pass

    def encode(self, job: JobParameters) -> JobParameters:
        self._misbehave(job, "encode")
        return job

    def denoise(self, job: JobParameters, encoded: JobParameters, on_step: Callable[[], None]) -> JobParameters:
        assert job == encoded
        for step in range(job.num_inference_steps):
            if "wait" in job.prompt.split() and self.rank == 0:
                self.gate.acquire()
            if dist.is_initialized():
                self._step_together(job, step)
            elif step == 1:
                self._misbehave(job, "denoise")
            on_step()
        return job

    def _step_together(self, job: JobParameters, step: int) -> None:
        """As a model would: a collective of its own within each step, and failures before or within it."""
        if step == 1:
            self._misbehave(job, "denoise")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
        if step == 1:
            self._misbehave(job, "step_end")

    def measure(self) -> Measured:
        return Measured(0.5, (("fake", 1),), 1 << 20)

    def decode(self, latents: JobParameters, on_part: Callable[[int, int], None]) -> JobParameters:
        for part in range(3):
            if part == 1:
                self._misbehave(latents, "decode")
            on_part(part + 1, 3)
        return latents

    def save(self, job: JobParameters, frames: JobParameters, path: Path) -> None:
        self._misbehave(job, "save")
        with whole_file(path) as temporary:
            temporary.write_bytes(f"video {job.seed} {job.prompt} {len(job.image or b'')}".encode())
        self.after_save()

    def recover(self) -> None:
        self.recovered += 1

    def _misbehave(self, job: JobParameters, place: str) -> None:
        asked = dict(word.split("=", 1) for word in job.prompt.split() if "=" in word)
        if asked.get("slow_in") == place and str(self.rank) == asked["slow_on"]:
            time.sleep(3)
        ranks = asked.get("on", "0").split(",")
        if str(self.rank) not in ranks:
            return
        if asked.get("hang_in") == place:
            time.sleep(10 * PATIENCE_S)
        if asked.get("fail_in") == place:
            raise {
                "oom": torch.OutOfMemoryError("CUDA out of memory"),
                "value": ValueError("the kernel takes no such video; use another"),
                "bug": KeyError("/root/secret/path.py"),
                "runtime": RuntimeError("the other half of guidance failed"),
                "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                "nan": NotFiniteError("3 of 4 latents of this video are not finite; ask for another seed"),
            }[asked.get("with", "bug")]


class LocalServer(Client):
    """A server of `FakeBackend` in this process: HTTP in one thread, the engine in another."""

    def __init__(
        self, folder: Path, api_key: str | None = None, card: ModelCard = CARD, host: str = "127.0.0.1", **limits: Any
    ) -> None:
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        super().__init__(f"http://127.0.0.1:{port}", headers=headers)
        self.port, self.backend, self.store = port, FakeBackend(card=card), JobStore(folder)
        self.store.recover()
        control, watchdog, bounds = Control(0, 1, None), Watchdog(), Bounds(PATIENCE_S, PATIENCE_S)
        runner = JobRunner(self.backend, control, watchdog, bounds)
        self.engine = Engine(self.store, runner, control, watchdog, bounds, Metrics(), heartbeat_s=0.05)
        self.limits = replace(Limits(), **limits)
        service = Service(self.backend, self.store, self.engine, self.limits, Metrics(), 3600, host, api_key)
        self.app = create_app(service)
        self._web = WebServer(self.app, listener, self.limits.body_s)
        self._engine_thread = threading.Thread(target=self.engine.run, daemon=True)
        self._engine_thread.start()
        self.wait_ready()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.drain(0)
        self.backend.gate.release(1_000_000)
        self._engine_thread.join(PATIENCE_S)
        self.http.close()
        self._web.close()
        self.store.close()
        assert not self._engine_thread.is_alive()

    @property
    def connections(self) -> set[Any]:
        """What uvicorn holds open."""
        return self._web._server.server_state.connections

    def steps(self, count: int) -> None:
        """Let so many steps of jobs that wait happen."""
        self.backend.gate.release(count)
