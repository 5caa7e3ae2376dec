"""The ranks of a job: their process group, what they agree on, and what happens when one of them stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.rendezvous import rendezvous

from sp_sparse.parallel.agreement import LostRankError, check_all_same, every_value, this_node, together

T = TypeVar("T")

_START = "sp_sparse/start"
_LOOK_S = 0.05

USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


@dataclass(frozen=True)
class Ranks:
    """This rank among the others.

    Attributes:
        rank: number of this one.
        world: how many there are.
        device: where this one computes.
        nodes: name of the machine of each rank; empty where that does not matter.
    """

    rank: int
    world: int
    device: torch.device
    nodes: tuple[str, ...] = ()

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Tell the user something, once for all ranks."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The group of all ranks; none where there is one rank."""
        return () if self.world == 1 or dist.group.WORLD is None else (dist.group.WORLD,)

    def gather(self, value: T) -> list[T]:
        """The value of every rank. A collective call."""
        return list(every_value(value, self.groups).values())

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every rank that may be refused; if one rank fails, all of them do. A collective call.

        Raises:
            RefusedError: it failed on some rank.
        """
        return together(action, self.groups, USER_ERRORS, self.name)

    def name(self, rank: int) -> str:
        """What users read of a rank: its number, and with several nodes where it is."""
        return f"rank {rank} on {self.nodes[rank]}" if len(set(self.nodes)) > 1 else f"rank {rank}"

    def check_same(self, arguments: Any, but: tuple[str, ...] = ()) -> None:
        """Fail on every rank if the fields of a dataclass, `but` for these, differ between ranks. A collective call.

        Raises:
            RefusedError: with what differs, and each rank's value of it.
        """
        names = [entry.name for entry in fields(arguments) if entry.name not in but]
        check_all_same({name: getattr(arguments, name) for name in names}, self.groups)


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def start_ranks(device: str, timeout_s: float, on_stop: Callable[[], None] | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started; without torchrun this process is the only one.

    `on_stop` is called, from a thread of its own, when the process is told to stop by SIGTERM or SIGINT; without it
    SIGTERM ends a process among several at once.

    A process group that is there already is used and kept. After an error the group is left as it is: end the process
    with `leave`.

    Raises:
        ValueError: no GPU, or fewer than ranks on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = rank_from_environment()
    place = _device(device)
    if on_stop is not None:
        _call_when_stopped((signal.SIGTERM, signal.SIGINT), on_stop)
    if world == 1 or dist.is_initialized():
        yield Ranks(rank, world, place, _every_node())
        return
    if on_stop is None:
        _call_when_stopped((signal.SIGTERM,), lambda: _speak_and_end(rank))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        # Beside NCCL a backend for the host, where ranks compare numbers without waiting for the device.
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        store=_meeting_place(rank, world, timeout),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    yield Ranks(rank, world, place, _every_node())
    dist.barrier()  # a rank that leaves early breaks those still talking to it
    dist.destroy_process_group()


def _meeting_place(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """The store of torchrun, where ranks leave their addresses for one another; a part of it that is this start's own.

    torchrun keeps it when it starts the ranks anew, with the addresses of those that are gone.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(_agree_on_start(store, rank, world, timeout), store)


def _agree_on_start(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name for this start of the ranks, the same on all of them and new.

    TORCHELASTIC_RESTART_COUNT is none: each node counts its own, and one that was replaced begins at 0. The first rank draws
    the name, and the others take it only if they are among those that it has met: else it is that of a start before.

    Raises:
        DistError: the others did not come in time.
    """
    own = uuid4().hex
    if rank == 0:
        store.set(_START, own)
        met = [store.get(f"{_START}/{own}/{other}").decode() for other in range(1, world)]
        store.set(f"{_START}/{own}", " ".join(met))
        return own
    end = monotonic() + timeout.total_seconds()
    while monotonic() < end:
        start = store.get(_START).decode()
        store.set(f"{_START}/{start}/{rank}", own)
        if store.check([f"{_START}/{start}"]) and own in store.get(f"{_START}/{start}").decode().split():
            return start
        sleep(_LOOK_S)
    raise LostRankError("the ranks did not all start")


def _every_node() -> tuple[str, ...]:
    """The node of each rank. A collective call."""
    groups = () if dist.group.WORLD is None else (dist.group.WORLD,)
    return tuple(every_value(this_node(), groups).values())


def leave(status: int) -> NoReturn:
    """End the process; after a failure without tidying up, which could wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    sys.exit()


def _device(choice: str) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {count} are visible here; start at most {count} ranks a machine, "
            "or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _call_when_stopped(signals: tuple[signal.Signals, ...], action: Callable[[], None]) -> None:
    """Call `action` whenever one of the signals comes, though the main thread may sit in a collective for ever.

    A Python signal handler would wait for the main thread; the wake-up file descriptor is written at once, and a thread
    reads it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        while True:
            if set(signals) & set(os.read(reader, 16)):
                action()

    threading.Thread(target=wait, name="stop-signal", daemon=True).start()


def _speak_and_end(rank: int) -> None:
    """Say why before ending on SIGTERM, by which torchrun stops the ranks that outlive one that failed."""
    text = "a rank stopped, or the job was cancelled (SIGTERM); see the first error of the other ranks"
    print(f"rank {rank}: error: {text}", file=sys.stderr, flush=True)
    os._exit(1)
