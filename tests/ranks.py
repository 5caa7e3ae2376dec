"""Runs a function on forked gloo ranks; an exception on any rank fails the test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import ProcessGroup


def run_ranks(world: int, function: Callable[..., None], *arguments: Any, timeout_s: float = 60.0) -> None:
    """Call `function(rank, *arguments)` on `world` ranks with an initialised gloo process group."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.start_processes(
            _rank_main,
            args=(world, store, timeout_s, function, arguments),
            nprocs=world,
            join=True,
            start_method="fork",
        )


def world_group() -> ProcessGroup:
    """The default process group, as a group that calls can be given."""
    group = dist.group.WORLD
    assert group is not None
    return group


def _rank_main(
    rank: int, world: int, store: str, timeout_s: float, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )
    try:
        function(rank, *arguments)
    except pytest.fail.Exception as failed:  # "DID NOT RAISE" and the like; torch passes on what is an Exception alone
        raise AssertionError(str(failed)) from failed
    dist.barrier()  # a rank that leaves early breaks those still talking to it
    dist.destroy_process_group()
