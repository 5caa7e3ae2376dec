"""Attention as one operator that torch.compile takes as it is: no graph break, no recompilation from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# An operator takes tensors and numbers only, so it finds its Python object here; entries go when their owner goes.
_CALLS: WeakValueDictionary[int, OpaqueCall] = WeakValueDictionary()
_NUMBERS = itertools.count()


class OpaqueCall:
    """Calls `function(query, key, value, *sizes)`, within a compiled graph as the operator `sp_sparse::attend`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        number = next(_NUMBERS)
        _CALLS[number] = self
        # A tensor, as an integer would be compiled into the graph, once a layer. On the CPU whatever device is the default
        # one: reading it must not wait for a GPU, nor find nothing on `meta`.
        self._number = torch.tensor(number, device="cpu")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *sizes: int) -> Tensor:
        if torch.compiler.is_compiling():
            return _attend(query, key, value, self._number, sizes)
        return self.function(query, key, value, *sizes)


@torch.library.custom_op("sp_sparse::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, number: Tensor, sizes: Sequence[int]) -> Tensor:
    # The compiled code around it relies on the layout that the fake below tells.
    return _CALLS[int(number)].function(query, key, value, *sizes).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, number: Tensor, sizes: Sequence[int]) -> Tensor:
    return query.new_empty(query.shape)
