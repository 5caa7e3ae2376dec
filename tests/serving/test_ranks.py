"""What several ranks do when one of them fails, hangs or is stopped; with a backend that needs no model."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from sp_sparse.serve.api import create_app
from sp_sparse.serve.backend import JobParameters
from sp_sparse.serve.control import CANCEL, GO_ON, INTERRUPT, Control
from sp_sparse.serve.engine import Engine, follow
from sp_sparse.serve.limits import Limits
from sp_sparse.serve.metrics import Metrics
from sp_sparse.serve.runner import Bounds, JobFailedError, JobRunner, JobStoppedError, Observer
from sp_sparse.serve.service import Service
from sp_sparse.serve.store import JobStore
from sp_sparse.serve.watchdog import Watchdog
from sp_sparse.serve.web import WebServer, listen
from tests.processes import PATIENCE_S, wait_for
from tests.ranks import run_ranks
from tests.serving.fake import FakeBackend
from tests.serving.server import RankServer

BOUNDS = Bounds(PATIENCE_S, PATIENCE_S)


def _job(prompt: str, seed: int = 1, steps: int = 4) -> JobParameters:
    return JobParameters(prompt, "", 64, 64, 5, 8, steps, seed, 3.0)


class _StopAt(Observer):
    """Stops the job when so many parts are done."""

    def __init__(self, part: int, command: int) -> None:
        self.left, self._command = part, command

    def part(self) -> None:
        self.left -= 1

    def command(self) -> int:
        return GO_ON if self.left > 0 else self._command


def _outcome(run: Callable[[], Any]) -> str:
    try:
        run()
    except JobFailedError as failed:
        return f"{failed.error.code}: {failed.error.message}"
    except JobStoppedError as stopped:
        return f"stopped {stopped.command}"
    return "completed"


def _rank_runs(rank: int, world: int, folder: str, prompts: list[str], stops: list[tuple[int, int]]) -> None:
    """All jobs and stops in a row; what each rank saw goes to a file."""
    backend = FakeBackend(rank)
    runner = JobRunner(backend, Control.of_all_ranks(rank, world, PATIENCE_S), Watchdog(), BOUNDS)
    target = Path(folder, "video.mp4")
    seen = []
    for number, prompt in enumerate(prompts):
        seen.append(_outcome(partial(runner.run, _job(prompt, seed=number), target, Observer())))
        good = _job("a cat", seed=1000 + number)
        seen.append(_outcome(partial(runner.run, good, target, Observer())))
        if rank == 0:
            assert target.read_text().startswith(f"video {1000 + number} ")
    for part, command in stops:
        observer = _StopAt(part, command) if rank == 0 else Observer()
        seen.append(_outcome(partial(runner.run, _job("a cat"), target, observer)))
    seen.append(f"recovered {backend.recovered}")
    Path(folder, f"rank_{rank}").write_text(json.dumps(seen))


def test_a_job_is_stopped_at_a_step(tmp_path: Path) -> None:
    runner = JobRunner(FakeBackend(), Control(0, 1, None), Watchdog(), BOUNDS)
    observer = _StopAt(2, CANCEL)
    assert _outcome(partial(runner.run, _job("a cat"), tmp_path / "video.mp4", observer)) == f"stopped {CANCEL}"
    assert observer.left == 0, "steps were made that nobody wants"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_sees_the_same(tmp_path: Path, world: int) -> None:
    everyone = ",".join(map(str, range(world)))
    last = world - 1
    prompts = [
        f"fail_in={place} on={ranks} with={kind}"
        for place, ranks, kind in [
            ("encode", "0", "bug"),
            ("encode", str(last), "oom"),
            ("encode", everyone, "value"),
            ("denoise", everyone, "runtime"),  # as guidance on two halves does on the half that is well
            ("step_end", str(last), "runtime"),
            ("step_end", "0", "cublas"),
            ("decode", "0", "cublas"),
            ("decode", str(last), "oom"),
            ("decode", everyone, "bug"),
            ("save", "0", "full"),
            ("denoise", everyone, "nan"),
            ("denoise", everyone, "oom"),  # before a collective: on all ranks, as running out of memory mostly is
            ("step_end", "0", "oom"),  # after one: on any
            ("step_end", str(last), "value"),
            ("step_end", everyone, "bug"),
            ("save", "0", "bug"),
            ("save", str(last), "bug"),
        ]
        if world > 1 or place != "step_end"
    ]
    stops = [(0, CANCEL), (1, CANCEL), (4, INTERRUPT), (5, CANCEL), (7, INTERRUPT), (99, CANCEL)]
    if world == 1:
        _rank_runs(0, 1, str(tmp_path), prompts, stops)
    else:
        run_ranks(world, _rank_runs, world, str(tmp_path), prompts, stops)
    seen = [json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in range(world)]
    assert all(one == seen[0] for one in seen)
    outcomes = seen[0][: 2 * len(prompts) : 2]
    assert seen[0][1 : 2 * len(prompts) : 2] == ["completed"] * len(prompts)
    codes = {
        "bug": "internal_error",
        "runtime": "internal_error",
        "oom": "out_of_memory",
        "cublas": "out_of_memory",
        "value": "invalid_request",
        "full": "no_room",
        "nan": "not_finite",
    }
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        only_first_saves = "save" in prompt and f"on={last}" in prompt and last > 0
        assert outcome.startswith("completed" if only_first_saves else codes[prompt.rpartition("=")[2]])
    failures = sum(outcome != "completed" for outcome in outcomes)
    assert seen[0][2 * len(prompts) :] == [
        f"stopped {CANCEL}",
        f"stopped {CANCEL}",
        f"stopped {INTERRUPT}",
        f"stopped {CANCEL}",
        f"stopped {INTERRUPT}",
        "completed",
        f"recovered {failures}",
    ]


def _rank_ends(rank: int, folder: str, prompt: str) -> None:
    log = os.open(Path(folder, f"rank_{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(log, "w", buffering=1)
    control = Control.of_all_ranks(rank, 2, PATIENCE_S)
    runner = JobRunner(FakeBackend(rank), control, Watchdog(), Bounds(4.0, 1.0))
    # Where a video of the kind was made, nothing compiles: the shorter bound holds.
    runner.run(_job("a cat"), Path(folder, "video.mp4"), Observer())
    runner.run(_job(prompt), Path(folder, "video.mp4"), Observer())


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        # One rank fails while the other sits in a collective: nothing can be agreed on.
        ("fail_in=denoise on=1 with=oom", "telling the other ranks of a failure (the server ran out of memory"),
        ("fail_in=denoise on=0 with=oom", "telling the other ranks of a failure (the server ran out of memory"),
        ("hang_in=denoise on=1", "a step of denoise took more than 4 s"),
        ("hang_in=encode on=0", "a step of encode took more than 4 s"),
        ("hang_in=decode on=1", "a step of decode took more than 4 s"),
        ("hang_in=save on=0", "a step of save took more than 4 s"),
    ],
)
def test_what_cannot_be_agreed_on_ends_the_processes(tmp_path: Path, prompt: str, told: str) -> None:
    with pytest.raises(Exception, match=r"exit code 1|Connection|gloo"):
        run_ranks(2, _rank_ends, str(tmp_path), prompt)
    logs = [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)]
    assert any(told in log for log in logs), logs
    assert any("ending, so that the ranks can start anew" in log for log in logs)


def _rank_compiles(rank: int, folder: str) -> None:
    control = Control.of_all_ranks(rank, 2, PATIENCE_S)
    runner = JobRunner(FakeBackend(rank), control, Watchdog(), Bounds(PATIENCE_S, 1.0))
    prompts = ["fail_in=encode on=0 with=oom slow_in=encode slow_on=1", "fail_in=encode on=1 slow_in=encode slow_on=0"]
    seen = [_outcome(partial(runner.run, _job(prompt), Path(folder, "video.mp4"), Observer())) for prompt in prompts]
    seen.append(_outcome(partial(runner.run, _job("a cat"), Path(folder, "video.mp4"), Observer())))
    assert [told.partition(":")[0] for told in seen] == ["out_of_memory", "internal_error", "completed"]


def test_a_rank_that_compiles_hears_of_a_failure_when_it_is_done(tmp_path: Path) -> None:
    """Three seconds later, which is more than the bound that holds where videos of the kind were made."""
    run_ranks(2, _rank_compiles, str(tmp_path))


def fake_main(flags: list[str]) -> int:
    """As `sp_sparse.serve`, for `FakeBackend`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    control, watchdog = Control.of_all_ranks(rank, world, PATIENCE_S), Watchdog()
    backend = FakeBackend(rank)
    runner = JobRunner(backend, control, watchdog, BOUNDS)
    if rank != 0:
        follow(control, runner, watchdog, BOUNDS)
        return 0
    port, folder = int(flags[flags.index("--port") + 1]), Path(flags[flags.index("--data-dir") + 1])
    store, metrics = JobStore(folder), Metrics()
    engine = Engine(store, runner, control, watchdog, BOUNDS, metrics)
    limits = Limits(queue=50)
    service = Service(backend, store, engine, limits, metrics, 3600, "127.0.0.1", None)
    WebServer(create_app(service), listen("127.0.0.1", port), limits.body_s)
    engine.run()
    return 0


def test_two_hundred_clients_and_no_lost_job(tmp_path: Path) -> None:
    """Each posts a job, again when the queue is full, polls it to its end and fetches it."""
    with RankServer(tmp_path, 2, program=fake_main) as server:

        def client(number: int) -> tuple[str, int, bytes]:
            with httpx.Client(base_url=server.url, timeout=PATIENCE_S, trust_env=False) as http:

                def insist(method: str, path: str, **options: Any) -> httpx.Response:
                    def answered() -> httpx.Response | None:
                        answer = http.request(method, path, **options)
                        if answer.status_code == 429:
                            assert int(answer.headers["Retry-After"]) >= 1
                            return None
                        return answer

                    found: httpx.Response = wait_for(answered)
                    assert found.status_code == 200, found.text
                    return found

                job = insist("POST", "/v1/videos", json={"prompt": "a cat", "seed": number}).json()
                path = f"/v1/videos/{job['id']}"
                wait_for(lambda: insist("GET", path).json()["status"] == "completed")
                return job["id"], job["seed"], insist("GET", f"{path}/content").content

        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            results = list(pool.map(client, range(200)))
        assert [seed for _, seed, _ in results] == list(range(200))
        assert [video for _, _, video in results] == [f"video {n} a cat 0".encode() for n in range(200)]
        listed: list[str] = []
        page: dict[str, Any] = {"has_more": True, "last_id": None}
        while page["has_more"]:
            after = {} if page["last_id"] is None else {"after": page["last_id"]}
            page = server.http.get("/v1/videos", params={"limit": 30, **after}).json()
            listed += [job["id"] for job in page["data"]]
        assert len(listed) == 200
        assert {job_id for job_id, _, _ in results} == set(listed)
