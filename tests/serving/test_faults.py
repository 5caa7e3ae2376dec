"""Ranks that die or hang: everything ends, torchrun starts it anew, and the queue is still there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import process_of_rank, wait_for
from tests.serving.server import SPARSE, TINY, Client, RankServer, free_port

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--max-steps", "15000"]


def test_torchrun_brings_the_service_back_with_its_queue(tmp_path: Path) -> None:
    """kill -9 of each rank in turn, amid a job; at last SIGTERM to torchrun drains."""
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "3", str(ROOT / "launch" / "serve.py"), "--ulysses-degree", "2"]
    flags = ["--port", str(port), "--data-dir", str(tmp_path / "data"), "--max-tries", "10", *TINY, *SPARSE, *STEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([*torchrun, *flags], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    client = Client(f"http://127.0.0.1:{port}")
    try:
        client.wait_ready()
        done = client.completed(seed=1)
        running, waiting = client.create(num_inference_steps=15000)["id"], client.create(seed=2)["id"]
        for tries, rank in enumerate((0, 1), start=1):
            wait_for(lambda: client.get(running)["step"] > 0)
            assert client.get(running)["tries"] == tries
            killed = process_of_rank(job.pid, rank)
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda p=killed, r=rank: process_of_rank(job.pid, r) not in (None, p))  # type: ignore[misc]
            client.wait_ready()
        wait_for(lambda: client.get(running)["step"] > 0)
        assert client.get(running)["tries"] == 3
        assert "sp_sparse_restarts 2.0" in client.http.get("/metrics").text
        client.http.delete(f"/v1/videos/{running}")
        assert client.ended(waiting)["status"] == "completed"
        assert client.content(done["id"])[4:8] == b"ftyp"
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    finally:
        for rank in range(2):
            process = process_of_rank(job.pid, rank)
            if process is not None:
                os.kill(process, signal.SIGKILL)
        job.kill()
        job.wait()
        client.http.close()
    text = (tmp_path / "log").read_text()
    assert text.count("1 requeued, 0 failed, 0 removed") == 2
    assert text.rstrip().count("drained") == 1


@pytest.mark.parametrize(
    ("world", "victim"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)], ids=lambda number: str(number)
)
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, world: int, victim: int) -> None:
    mesh = ["--ulysses-degree", "2", "--ring-degree", str(world // 2)]
    with RankServer(tmp_path, world, *mesh, *STEPS) as server:
        job = server.create(num_inference_steps=15000)["id"]
        wait_for(lambda: server.get(job)["step"] > 0)
        server.signal(victim, signal.SIGKILL)
        codes = server.join()
        assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(world)]
        assert "error: a rank stopped or did not answer" in server.log


def test_an_idle_server_notices_too(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--ulysses-degree", "2") as server:
        server.signal(1, signal.SIGKILL)
        assert server.join() == [1, -signal.SIGKILL]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_others_within_a_bound(tmp_path: Path, victim: int) -> None:
    with RankServer(tmp_path, 2, "--ring-degree", "2", "--timeout-s", "6", *STEPS) as server:
        job = server.create(num_inference_steps=15000)["id"]
        wait_for(lambda: server.get(job)["step"] > 0)
        server.signal(victim, signal.SIGSTOP)
        other = server.processes[1 - victim]
        other.join(120)
        assert other.exitcode == 1
        assert re.search(r"a step of denoise took more than 6 s; ending|a rank stopped or did not answer", server.log)
        server.signal(victim, signal.SIGCONT)  # it finds its peer gone, or itself late
        server.processes[victim].join(120)
        assert server.processes[victim].exitcode == 1
        assert not server.is_ready()
