"""How rank 0 leads the others: small collectives over a gloo group, the same sequence on every rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from sp_sparse.parallel.agreement import every_value

# What a rank says at an exchange. Only rank 0 says CANCEL and INTERRUPT.
GO_ON, FAILED, CANCEL, INTERRUPT = range(4)


class Control:
    """The ranks' own channel, beside those that carry tensors; waiting there costs no GPU and hardly a CPU."""

    def __init__(self, rank: int, world: int, group: ProcessGroup | None) -> None:
        """`group` is a gloo group of all ranks, None where there is one rank."""
        self.rank, self.world, self._group = rank, world, group

    @classmethod
    def of_all_ranks(cls, rank: int, world: int, timeout_s: float) -> Control:
        """A collective call."""
        group = None
        if world > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(rank, world, group)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def broadcast(self, message: Any = None) -> Any:
        """What rank 0 says, on every rank. A collective call."""
        if self.world == 1:
            return message
        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self._group, device=torch.device("cpu"))
        return messages[0]

    def exchange(self, code: int) -> list[int]:
        """The codes of all ranks. A collective call."""
        if self.world == 1:
            return [code]
        mine = torch.tensor([code], dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self._group)
        return [int(other) for other in every]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank. A collective call."""
        return list(every_value(value, () if self._group is None else (self._group,)).values())
