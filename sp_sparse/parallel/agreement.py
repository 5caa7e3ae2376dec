"""What ranks agree on before they go on: values that must be alike, and whether an action went well on all of them.

Several groups, such as the Ulysses, ring and CFG groups of a mesh, are gone through one after the other: what one has
gathered the next one passes on, so that every rank hears of every other. Without a group the process is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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


def check_all_same(values: Mapping[str, object], groups: Sequence[ProcessGroup]) -> None:
    """`check_same` for several values by their names, of which only those that differ are told. A collective call."""
    every = every_value({what: repr(value) for what, value in values.items()}, groups)
    differing = [
        f"{what} ({'; '.join(f'rank {rank}: {texts[what]}' for rank, texts in every.items())})"
        for what in values
        if len({texts[what] for texts in every.values()}) > 1
    ]
    if differing:
        text = f"ranks differ in {', '.join(differing)}; start every rank with the same arguments"
        raise RefusedError(text, speaks=True, failure=text)


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


def _this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
