"""What failed on some rank becomes a failure of all ranks at their next meeting, and is no news at the ones after that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from sp_sparse.parallel.agreement import (
    LostRankError,
    RefusedError,
    every_value,
    is_lost_rank,
    largest,
    leave_word,
    says_lost_rank,
    this_rank,
)

_REMEDY = "mend that and make the video anew"


@dataclass(frozen=True)
class Failure:
    """What failed first.

    Attributes:
        rank: where.
        text: kind and message of the error.
        refused: every rank knew it.
        out_of_memory: memory was what lacked.
    """

    rank: int
    text: str
    refused: bool
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, (FailedElsewhereError, OutOfMemoryElsewhereError)):
            return error.failure
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        return cls(this_rank(), f"{type(error).__name__}: {error}", isinstance(error, RefusedError), memory)

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class FailedElsewhereError(RuntimeError):
    """Another rank failed, and with it this one."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(_sentence(failure))
        self.failure = failure


class OutOfMemoryElsewhereError(torch.OutOfMemoryError):
    """Another rank ran out of memory, and with it this one failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(_sentence(failure))
        self.failure = failure


def _sentence(failure: Failure) -> str:
    return f"another rank failed, and with it this step here ({failure}); {_REMEDY}"


def meet(error: Exception | None, groups: Sequence[ProcessGroup]) -> Exception | None:
    """What to raise if this rank or another failed; None if all are well. A collective call."""
    (failed,) = largest((error is not None,), groups)
    if not failed:
        return None
    every = every_value(None if error is None else Failure.of(error), groups)
    failures = sorted((x for x in every.values() if x is not None), key=lambda x: x.rank)
    first = failures[0]
    if any(failure.refused for failure in failures):
        # Those that are refused do not go on to compare: nor may the others.
        return error if isinstance(error, RefusedError) else RefusedError(str(error or first), False, str(first))
    if error is not None:
        return error
    return OutOfMemoryElsewhereError(first) if first.out_of_memory else FailedElsewhereError(first)


class Standing:
    """Whether the groups of a mesh can still be used: a collective that one rank left half-done spoils all later ones.

    Attributes:
        can_meet: whether ranks can still tell each other of it, beside the collectives that are spoilt.
    """

    def __init__(self) -> None:
        self._left: str | None = None
        self.can_meet = True

    def leave(self, error: Exception, can_meet: bool) -> None:
        """Collectives were left half-done: by this rank for `error`, or by another, of which `error` tells."""
        if self._left is not None:
            return
        lost = is_lost_rank(error)
        self._left, self.can_meet = str(error) if lost else str(Failure.of(error)), can_meet
        if not lost:
            leave_word(self._left)

    @contextmanager
    def watch(self, where: str) -> Iterator[None]:
        """`says_lost_rank` for collectives: a rank that is lost in them is lost for all later ones."""
        try:
            with says_lost_rank(where):
                yield
        except LostRankError as error:
            self.leave(error, can_meet=False)
            raise

    def meet(self, error: Exception | None, groups: Sequence[ProcessGroup], where: str) -> Exception | None:
        """As the function; a rank that cannot be met is lost, and what happened here first is raised rather than that."""
        try:
            with self.watch(where):
                return meet(error, groups)
        except Exception as told:
            return told if error is None else error

    def check(self) -> None:
        """Refuse to use the groups again.

        Raises:
            LostRankError: collectives were left half-done.
        """
        if self._left is not None:
            raise LostRankError(
                f"the ranks are out of step since a collective was left half-done ({self._left}), so nothing can be made on "
                "them any more; start all ranks anew"
            )
