"""A rank that is killed amid an exchange of keys ends the others with what to do; two transformers, both exchanges."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers")

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttention, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import run, tiny_pipeline

CONFIG = SparseAttentionConfig(backend="reference", topk=0.4, schedule="constant", block_size=(8, 8))
TIMEOUT_S = 10
# What sends keys and values under each exchange, once for each hop and tensor or once for all.
SENDS = {"ring": "all_to_all_single", "all_gather": "batch_isend_irecv"}
KILLED = 9


def _config(exchange: str, **changes: Any) -> SparseAttentionConfig:
    return SparseAttentionConfig(**{**vars(CONFIG), "kv_exchange": exchange, **changes})


def _kill_within(exchange: str, call: int) -> None:
    """This process is killed when it is about to make its `call`-th exchange from now, with earlier ones on their way."""
    own, calls = getattr(dist, SENDS[exchange]), [0]

    def sending(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(dist, SENDS[exchange], sending)


def _layer_calls(exchange: str) -> Callable[[], object]:
    mesh = SequenceParallelMesh(1, 4, timeout=timedelta(seconds=TIMEOUT_S))
    layer = SparseAttention(_config(exchange), mesh, num_heads=2, head_dim=8)
    x = torch.randn(1, 16, 2, 8)
    return lambda: layer(x, x, x, grid=(1, 8, 8))


def _pipeline_calls(exchange: str) -> Callable[[], object]:
    pipe, mesh = tiny_pipeline("t2v"), SequenceParallelMesh(1, 4, timeout=timedelta(seconds=TIMEOUT_S))
    enable_sparse_attention(pipe, _config(exchange), mesh)
    return lambda: run(pipe)


MAKERS = {"layer": _layer_calls, "pipeline": _pipeline_calls}


def _rank(rank: int, folder: str, what: str, exchange: str, victim: int, call: int) -> None:
    """The first call goes well on all ranks; the others write what ended their second."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=TIMEOUT_S)
    )
    calling = MAKERS[what](exchange)
    calling()
    if rank == victim:
        _kill_within(exchange, call)
    ended = "returned"
    try:
        calling()
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    Path(folder, f"end-{rank}").write_text(ended)
    os._exit(0)


@pytest.mark.parametrize(
    ("what", "exchange", "victim", "call"),
    [
        ("layer", "ring", 1, 3),  # its own keys and values have gone on, those of another have not
        ("layer", "ring", 3, 2),  # between keys and values
        ("layer", "all_gather", 2, 1),
        ("pipeline", "ring", 2, 5),
        ("pipeline", "all_gather", 0, 3),
    ],
)
def test_a_rank_killed_amid_an_exchange_ends_the_others_with_what_to_do(
    what: str, exchange: str, victim: int, call: int, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    arguments = str(tmp_path), what, exchange, victim, call
    workers = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(4)]
    for worker in workers:
        worker.start()
    give_up = time.monotonic() + 8 * TIMEOUT_S
    for worker in workers:
        worker.join(max(0.0, give_up - time.monotonic()))
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for rank in hung:
        workers[rank].kill()
        workers[rank].join()
    assert not hung, f"ranks {hung} wait for ever for rank {victim}"
    assert workers[victim].exitcode == -KILLED, "it was not killed within an exchange"
    for rank in set(range(4)) - {victim}:
        told = (tmp_path / f"end-{rank}").read_text()
        assert re.match("LostRankError: .*start them all anew", told), (rank, told)


def _check_two_experts(rank: int, ulysses: int, ring: int, exchange: str, expected: torch.Tensor) -> None:
    """Both experts of one pipeline, then another pipeline beside it under the other exchange, on the same mesh."""
    os.environ["GROUP_RANK"] = str(rank // (ulysses * ring // 2))
    mesh = SequenceParallelMesh(ulysses, ring)
    other = "ring" if exchange == "all_gather" else "all_gather"
    for one in (exchange, other):
        pipe, recorder = tiny_pipeline("t2v"), AttentionRecorder()
        with enable_sparse_attention(pipe, _config(one), mesh, recorder) as handle:
            assert {layer.expert for layer in handle.layers} == {0, 1}
            assert relative_error(run(pipe), expected) < 2e-5, one
        summary = recorder.summary(mesh.groups)
        assert {place["expert"] for place in summary["densities"]} == {0, 1}, "an expert was never called"
        picked = {told["name"] for told in summary["kv_exchange"]}
        assert picked == ({"all_gather" if ring > 2 else "ring"} if one == "auto" else {one})


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "auto"])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (2, 2)])
def test_two_transformers_under_each_exchange(ulysses: int, ring: int, exchange: str) -> None:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, CONFIG)
    run_ranks(ulysses * ring, _check_two_experts, ulysses, ring, exchange, run(pipe))
