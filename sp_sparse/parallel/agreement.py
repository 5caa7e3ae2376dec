"""What ranks agree on before they go on: values that must be alike, and whether an action went well on all of them.

Several groups, such as the Ulysses, ring and CFG groups of a mesh, are gone through one after the other: what one has
gathered the next one passes on, so that every rank hears of every other. Without a group the process is alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


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
    held = {_this_rank(): value}
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
    differing = [
        f"{what} ({'; '.join(f'rank {rank}: {texts[what]}' for rank, texts in every.items())})"
        for what in values
        if len({texts[what] for texts in every.values()}) > 1
    ]
    if differing:
        text = f"ranks differ in {', '.join(differing)}; {remedy}"
        raise RefusedError(text, speaks=True, failure=text)


def check_call(values: Mapping[str, object], groups: Sequence[ProcessGroup], device: torch.device, remedy: str) -> None:
    """`check_all_same` for what is compared again and again: 8 bytes a rank, and one wait for `device`."""
    if not groups:
        return
    digest = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=8).digest()
    every = torch.tensor([int.from_bytes(digest, "big", signed=True)], device=device)
    for group in groups:
        parts = [torch.empty_like(every) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, every, group=group)
        every = torch.cat(parts)
    if len(set(every.tolist())) > 1:
        check_all_same(values, groups, remedy)


def together(
    action: Callable[[], T], groups: Sequence[ProcessGroup], errors: tuple[type[Exception], ...] = (Exception,)
) -> T:
    """Do something on every rank; if one of them fails by one of `errors`, all of them do. A collective call.

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
    lowest, this = next(iter(every)), _this_rank()
    failure = f"rank {first}: {kind}: {text}"
    if error is not None:
        raise RefusedError(str(error), this == lowest or every[this] != every[lowest], failure) from error
    raise RefusedError(f"rank {first}: {text}", this == lowest, failure)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank stopped or did not answer."""
    # gloo raises plain RuntimeErrors, recognisable by their source file alone.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


@contextmanager
def says_lost_rank(where: str) -> Iterator[None]:
    """Turn what a backend says of a lost rank into a sentence that begins with `where`.

    Raises:
        LostRankError: another rank was lost.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or not is_lost_rank(error):
            raise
        raise LostRankError(
            f"{where}: another rank failed, was interrupted, or runs fewer steps, and this one waited for it in vain; see "
            "what the other ranks print, give all ranks the same steps, and start them all anew"
        ) from error


def _this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
