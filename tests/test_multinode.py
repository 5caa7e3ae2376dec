"""Two nodes: two torchrun agents of two ranks each on this machine, over gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from sp_sparse import SparseAttentionConfig
from sp_sparse.generate.arguments import GenerateArguments, parse_arguments
from sp_sparse.generate.attach import check_ranks
from sp_sparse.generate.files import decoded_pixels
from sp_sparse.generate.job import generate
from sp_sparse.generate.models import load_pipeline
from sp_sparse.generate.ranks import Ranks
from tests.oracle import relative_error
from tests.processes import process_of_rank, wait_for
from tests.serving.server import SPARSE, TINY, Client, free_port

ROOT = Path(__file__).resolve().parent.parent
MESH = ["--ulysses-degree", "2", "--ring-degree", "2"]


def _port() -> int:
    try:
        return free_port()
    except OSError as error:
        pytest.skip(f"no port can be bound here: {error}")


def _agent(
    folder: Path, node: int, port: int, restarts: int, *flags: str, command_name: str = "generate"
) -> subprocess.Popen[bytes]:
    """One node, which has a folder and a log of its own."""
    own = folder / f"node_{node}"
    own.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += ["--max-restarts", str(restarts), "-m", f"sp_sparse.{command_name}", *TINY, *SPARSE, *MESH, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"log_{node}").open("a") as log:
        return subprocess.Popen(command, cwd=own, env=environment, stdout=log, stderr=log)


def _kill(agent: subprocess.Popen[bytes], node: int) -> None:
    """The agent and its ranks, as where the power fails."""
    ranks = [process_of_rank(agent.pid, rank) for rank in (2 * node, 2 * node + 1)]
    for process in (agent.pid, *ranks):
        if process is not None and (process != agent.pid or agent.poll() is None):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def test_two_nodes_make_the_video_of_one_rank(tmp_path: Path) -> None:
    flags = ["--num-inference-steps", "2", "--output", "out/video.mp4", "--output-latents", "out/latents.pt"]
    port = _port()
    agents = [_agent(tmp_path, node, port, 0, *flags) for node in (0, 1)]
    try:
        assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log_0").read_text()
    finally:
        for node, agent in enumerate(agents):
            _kill(agent, node)
    assert not list((tmp_path / "node_1").iterdir()), "a node without rank 0 has written something"
    made = torch.load(tmp_path / "node_0/out/latents.pt")
    alone, exact = (_alone(tmp_path, dtype) for dtype in (torch.float32, torch.float64))
    assert relative_error(made, exact) < 2 * relative_error(alone, exact), "no worse than one rank's own rounding"


def _alone(folder: Path, dtype: torch.dtype) -> Tensor:
    """The latents of one rank, whose transformers are of this dtype."""
    latents = folder / "alone.pt"
    steps = ["--num-inference-steps", "2", "--output", str(folder / "alone.mp4"), "--output-latents", str(latents)]
    load = lambda arguments, model, device: load_pipeline(arguments, replace(model, dtype=dtype), device)  # noqa: E731
    assert generate(parse_arguments([*TINY, *SPARSE, *steps]), Ranks(0, 1, torch.device("cpu")), load) == 0
    return torch.load(latents)


def test_a_job_of_the_server_is_made_after_a_rank_of_the_other_node_has_died(tmp_path: Path) -> None:
    """And is not lost; a video is the same before and after."""
    port, http = _port(), _port()
    flags = ["--port", str(http), "--data-dir", "data", "--timeout-s", "120", "--max-steps", "200"]
    agents = [_agent(tmp_path, node, port, 3, *flags, command_name="serve") for node in (0, 1)]
    client = Client(f"http://127.0.0.1:{http}")
    small = {"size": "64x64", "num_frames": 5, "seed": 1}
    try:
        client.wait_ready()
        before = client.completed(num_inference_steps=2, **small)["id"]
        job = client.create(num_inference_steps=200, **small)["id"]
        wait_for(lambda: client.get(job)["step"] > 0)
        killed = process_of_rank(agents[1].pid, 3)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: process_of_rank(agents[1].pid, 3) not in (None, killed))
        client.wait_ready()
        ended = _ended(client, job)
        assert (ended["status"], ended["tries"]) == ("completed", 2), ended
        after = client.completed(num_inference_steps=2, **small)["id"]
        assert decoded_pixels(client.content(after)) == decoded_pixels(client.content(before))
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        for agent in agents:
            agent.wait(60)
    finally:
        for node, agent in enumerate(agents):
            _kill(agent, node)
        client.http.close()
    assert (tmp_path / "node_0/data").is_dir()
    assert not list((tmp_path / "node_1").iterdir()), "a node without rank 0 has written something"
    assert "1 requeued, 0 failed, 0 removed" in (tmp_path / "log_0").read_text()


def _ended(client: Client, job: str) -> dict[str, Any]:
    """As `Client.ended`, of a server that may be dying, which closes connections amid an answer."""

    def has_ended() -> bool:
        try:
            return client.status(job) in ("completed", "failed")
        except httpx.TransportError:
            return False

    wait_for(has_ended, f"the end of {job}")
    return client.get(job)


def test_a_node_that_dies_is_told_and_comes_back(tmp_path: Path) -> None:
    """The second time no start is left: the other node ends, too."""
    flags = ["--num-inference-steps", "100000", "--timeout-s", "60"]
    port, log = _port(), tmp_path / "log_0"

    def is_denoising(start: int) -> bool:
        parts = log.read_text().split("encode: ")
        return len(parts) == start + 1 and re.search(r"[1-9]\d*/100000 ", parts[-1]) is not None

    agents = [_agent(tmp_path, node, port, 1, *flags) for node in (0, 1)]
    try:
        wait_for(lambda: is_denoising(1))
        _kill(agents[1], 1)
        agents[1] = _agent(tmp_path, 1, port, 1, *flags)
        wait_for(lambda: is_denoising(2))
        _kill(agents[1], 1)
        assert agents[0].wait(60) != 0
    finally:
        for node, agent in enumerate(agents):
            _kill(agent, node)
    assert "error: a rank stopped" in log.read_text()


def test_a_file_that_one_node_lacks_is_told_with_the_node(tmp_path: Path) -> None:
    (tmp_path / "node_0").mkdir()
    (tmp_path / "node_0/prompts.txt").write_text("a cat\n")
    port = _port()
    agents = [_agent(tmp_path, node, port, 0, "--prompt-file", "prompts.txt") for node in (0, 1)]
    try:
        assert all(agent.wait(120) != 0 for agent in agents)
    finally:
        for node, agent in enumerate(agents):
            _kill(agent, node)
    assert re.search(r"error: rank 2 on node 1 \(.+\): .*prompts\.txt", (tmp_path / "log_0").read_text())


def test_a_ulysses_group_across_nodes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(0, 4, torch.device("cpu"), ("node 0 (a)",) * 3 + ("node 1 (b)",))
    sparse = SparseAttentionConfig(backend="reference")
    check_ranks(GenerateArguments(ring_degree=4, sparse=sparse), ranks)
    assert not capsys.readouterr().err
    check_ranks(GenerateArguments(ulysses_degree=2, ring_degree=2, sparse=sparse), ranks)
    told = "--ulysses-degree 2 crosses nodes: rank 2 on node 0 (a) exchanges heads with rank 3 on node 1 (b)"
    assert told in capsys.readouterr().err


def test_degrees_for_the_nodes_are_named() -> None:
    ranks = Ranks(0, 4, torch.device("cpu"), ("node 0 (a)",) * 2 + ("node 1 (b)",) * 2)
    with pytest.raises(ValueError, match="such as --ulysses-degree 2 --ring-degree 2 for 2 nodes of 2"):
        check_ranks(GenerateArguments(), ranks)
