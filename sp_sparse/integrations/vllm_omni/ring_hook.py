"""The one method of vllm-omni that is replaced: how its attention layer runs a ring.

`Attention._run_ring_attention` never asks the layer's implementation: it chooses a kernel by the backend's name, and for
a name that it does not know a dense one, without a word.
"""

from __future__ import annotations

import functools
import inspect

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention

from sp_sparse.integrations.vllm_omni.backend import SparseAttentionImpl

_HOOKED = "_run_ring_attention"
_CALLER = "_forward_impl"
_PARAMETERS = ["self", "query", "key", "value", "attn_metadata"]
_MARK = "sp_sparse_ring_hook"


def require_ring_hook() -> None:
    """Make vllm-omni's rings call `SparseAttentionImpl.forward_ring` of layers that have it; others run as before.

    Raises:
        RuntimeError: the method is not there, takes other arguments, is not called, or the hook did not take hold.
    """
    original = getattr(Attention, _HOOKED, None)
    if not getattr(original, _MARK, False):
        found = None if original is None else list(inspect.signature(original).parameters)
        called = _HOOKED in getattr(getattr(Attention, _CALLER, None), "__code__", _NoCode).co_names
        if found != _PARAMETERS or not called:
            raise RuntimeError(
                f"vllm-omni's ring cannot be reached: Attention.{_HOOKED} has parameters {found}, expected {_PARAMETERS}, "
                f"{'' if called else 'not '}called by {_CALLER}; use ring_degree=1, or the vllm-omni that sp_sparse supports"
            )
        _place(original)
    if not getattr(getattr(Attention, _HOOKED, None), _MARK, False):
        raise RuntimeError(
            f"sp_sparse's hook on Attention.{_HOOKED} is not in place, and without it a ring runs dense; use ring_degree=1"
        )


class _NoCode:
    co_names: tuple[str, ...] = ()


def _place(original: object) -> None:
    assert callable(original)

    @functools.wraps(original)
    def run(
        self: Attention, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        if isinstance(self.attention, SparseAttentionImpl):
            return self.attention.forward_ring(query, key, value, attn_metadata)
        return original(self, query, key, value, attn_metadata)

    setattr(run, _MARK, True)
    setattr(Attention, _HOOKED, run)
