"""What ranks agree on before they go on: values that must be alike, and whether an action went well on all of them.

Several groups, such as the Ulysses, ring and CFG groups of a mesh, are gone through one after the other: what one has
gathered the next one passes on, so that every rank hears of every other. Without a group the process is alone.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")

_NUMBERS = 8
_WORD = "sp_sparse/why_a_rank_left"


class RefusedError(RuntimeError):
    """Something was refused, and every rank knows it.

    Attributes:
        speaks: whether this rank is to report it; one that would only repeat the first rank is not.
        failure: what happened and on which rank, in the same words on every rank.
    """

    def __init__(self, text: str, speaks: bool, failure: str) -> None:
        super().__init__(text)
        self.speaks, self.failure = speaks, failure


class LostRankError(dist.DistError):  # type: ignore[misc]  # torch gives it no type
    """Another rank stopped, or did not come to the call that this one is in; in words instead of the backend's."""


def every_value(value: T, groups: Sequence[ProcessGroup]) -> dict[int, T]:
    """The value of every rank, by rank. A collective call."""
    held = {this_rank(): value}
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, held, group=group)
        held = {rank: other for part in parts for rank, other in part.items()}
    return dict(sorted(held.items()))


def check_same(what: str, value: object, groups: Sequence[ProcessGroup]) -> None:
    """Fail on every rank if the ranks hold different values of `what`. A collective call.

    Raises:
        RefusedError: with each rank's value; without this, ranks that differ would wait for each other for ever.
    """
    check_all_same({what: value}, groups)


def check_all_same(
    values: Mapping[str, object],
    groups: Sequence[ProcessGroup],
    remedy: str = "start every rank with the same arguments",
) -> None:
    """`check_same` for several values by their names, of which only those that differ are told. A collective call."""
    every = every_value({what: repr(value) for what, value in values.items()}, groups)
    named = dict.fromkeys(what for texts in every.values() for what in texts)
    told = {what: {rank: texts.get(what, "not compared") for rank, texts in every.items()} for what in named}
    differing = [
        f"{what} ({'; '.join(f'rank {rank}: {text}' for rank, text in texts.items())})"
        for what, texts in told.items()
        if len(set(texts.values())) > 1
    ]
    if differing:
        text = f"ranks differ in {', '.join(differing)}; {remedy}"
        raise RefusedError(text, speaks=True, failure=text)


def check_call(
    values: Mapping[str, object],
    groups: Sequence[ProcessGroup],
    device: torch.device,
    remedy: str,
    flags: Sequence[bool] = (),
) -> list[bool]:
    """`check_all_same` for what is compared again and again, in one small all-reduce a group.

    It waits for `device` only where a group has no backend for the host: `init_process_group("cpu:gloo,cuda:nccl")` gives
    groups one. Tells which of `flags` any rank raises.
    """
    if not groups:
        return list(flags)
    # 7 bytes, so that its negative is an int64 too.
    digest = int.from_bytes(hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=7).digest(), "big")
    least, most, *raised = largest((-digest, digest, *flags), groups, device)
    if -least != most:
        check_all_same(values, groups, remedy)
    return [bool(flag) for flag in raised]


def largest(numbers: Sequence[int], groups: Sequence[ProcessGroup], device: torch.device | None = None) -> list[int]:
    """The largest of each number over all ranks. A collective call.

    Exchanged on the host where a group has a backend for it, else on `device`, by default the current one of the group's.
    """
    # All such exchanges are alike in size: ranks that meet at different ones find that they differ, instead of breaking.
    told = torch.zeros(_NUMBERS, dtype=torch.int64, device="cpu")
    told[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    for group in groups:
        devices = _devices(group)
        told = told.to("cpu" if "cpu" in devices else device or devices[0])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    every: list[int] = told.tolist()
    return every[: len(numbers)]


def meet_on_host(groups: Sequence[ProcessGroup]) -> bool:
    """Whether all of the groups have a backend for tensors of the host, as those of "cpu:gloo,cuda:nccl" have."""
    return all("cpu" in _devices(group) for group in groups)


def _devices(group: ProcessGroup) -> list[str]:
    return [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]


def together(
    action: Callable[[], T],
    groups: Sequence[ProcessGroup],
    errors: tuple[type[Exception], ...] = (Exception,),
    name: Callable[[int], str] = "rank {}".format,
) -> T:
    """Do something on every rank; if one of them fails by one of `errors`, all of them do. A collective call.

    `name` is what a rank is called in what is told.

    Raises:
        RefusedError: it failed on some rank.
    """
    error: Exception | None = None
    try:
        result = action()
    except RefusedError:  # on all ranks already
        raise
    except errors as caught:
        if is_lost_rank(caught):
            raise
        error = caught
    every = every_value(None if error is None else (type(error).__name__, str(error)), groups)
    failures = {rank: failure for rank, failure in every.items() if failure is not None}
    if not failures:
        return result
    first, (kind, text) = next(iter(failures.items()))
    lowest, this = next(iter(every)), this_rank()
    failure = f"{name(first)}: {kind}: {text}"
    if error is not None:
        raise RefusedError(str(error), this == lowest or every[this] != every[lowest], failure) from error
    raise RefusedError(f"{name(first)}: {text}", this == lowest, failure)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank stopped or did not answer."""
    # gloo raises plain RuntimeErrors, recognisable by their words alone.
    gloo = isinstance(error, RuntimeError) and any(words in str(error) for words in ("/gloo/", "caused pair closure"))
    return gloo or isinstance(error, dist.DistError)


@contextmanager
def says_lost_rank(where: str) -> Iterator[None]:
    """Turn what a backend says of a lost rank into a sentence that begins with `where`.

    Raises:
        LostRankError: another rank was lost; with what it left by `leave_word`, if it did.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or not is_lost_rank(error):
            raise
        word = word_left() or "another rank failed, was interrupted, or runs fewer steps"
        raise LostRankError(
            f"{where}: {word}, and this one waited for it in vain; see what the other ranks print, give all ranks the same "
            "steps, and start them all anew"
        ) from error


def leave_word(text: str) -> None:
    """Why this rank leaves the others in the middle of a collective, for those who will have waited in vain."""
    store = _common_store()
    if store is not None:
        store.set(_WORD, text)


def word_left() -> str | None:
    """What the rank that left last has said of it."""
    try:
        store = _common_store()
        return store.get(_WORD).decode() if store is not None and store.check([_WORD]) else None
    except RuntimeError:  # the store has gone with a rank
        return None


def _common_store() -> dist.Store | None:
    """Of all ranks; None where torch gives none (before 2.7, or without a default process group)."""
    world = dist.group.WORLD
    find = getattr(world, "get_group_store", None)
    return None if find is None else find()


def this_node() -> str:
    """Where this rank runs, by torchrun's number, if it started it, and the machine's name."""
    number, machine = os.environ.get("GROUP_RANK"), socket.gethostname()
    return machine if number is None else f"node {number} ({machine})"


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
