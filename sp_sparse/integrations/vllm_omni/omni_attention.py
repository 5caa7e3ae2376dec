"""vllm-omni's own attention: dense, for dense layers and steps and for cross-attention; and its ring, which asks ours first.

The ring is the one method of its attention that is replaced. `Attention._run_ring_attention` never asks the layer's
implementation: it chooses a kernel by the backend's name, and for a name that it does not know a dense one, without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention
from vllm_omni.diffusion.attention.selector import _cached_get_backend_cls as backend_class
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group
from vllm_omni.diffusion.model_metadata import get_diffusion_model_metadata

from sp_sparse.integrations.vllm_omni.registration import BACKEND_NAME

# The method that an implementation runs its ring by; under this name no other backend has one by chance.
_OURS = "sp_sparse_ring"
_HOOKED = "_run_ring_attention"
_CALLER = "_forward_impl"
_MARK = "sp_sparse_ring_hook"


class DenseAttention:
    """What a layer would run without SP_SPARSE: the configured default backend, else the platform's.

    Attributes:
        name: what it is, for the log.
    """

    def __init__(self, **layer: Any) -> None:
        """`layer`: what vllm-omni's attention layer gives its implementation: heads, scale, role, prefix and so on."""
        config = get_current_diffusion_config_or_none()
        metadata = get_diffusion_model_metadata(getattr(config, "model_class_name", None))
        platform = backend_class(None, layer["head_size"], metadata.attention_mask_free)
        spec = getattr(getattr(config, "diffusion_attention_config", None), "default", None)
        if spec is not None and spec.backend.upper() == BACKEND_NAME:
            spec = None
        self._backend = platform if spec is None else backend_class(spec.backend, layer["head_size"])
        self._local = self._backend.get_impl_cls()(
            **layer,
            backend_kwargs=None if spec is None else spec.backend_kwargs(),
            backend_explicit=spec is not None,
        )
        self.name: str = self._backend.get_name()
        self._scale: float = layer["softmax_scale"]
        self._causal: bool = layer["causal"]
        self._ring: RingParallelAttention | None = None
        if config is not None and config.parallel_config.ring_degree > 1:
            # The platform's name, and not as a user's choice: so it takes the best ring kernel that is there.
            self._ring = RingParallelAttention(get_sp_group(), platform.get_name(), attn_backend_explicit=False)
            self.name = f"vllm-omni's ring ({platform.get_name()})"

    def local(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata | None) -> Tensor:
        """Attention over the keys that are given."""
        if metadata is not None and metadata.attn_mask is not None and not self._backend.supports_attention_mask():
            raise ValueError(
                f"attention backend {self._backend.get_name()} takes no attn_mask; choose another default backend"
            )
        return self._local.forward(query, key, value, metadata)

    def ring(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata | None) -> Tensor:
        """Attention over the keys of all ring ranks."""
        assert self._ring is not None, "called on a mesh without a ring"
        return self._ring.run_attention(query, key, value, metadata, softmax_scale=self._scale, causal=self._causal)


def require_ring_hook() -> None:
    """Make vllm-omni's rings call `sp_sparse_ring` of layers whose implementation has it; others run as before.

    The method's parameters have been checked (`versions.check_interface`).

    Raises:
        RuntimeError: the method is not called, or the hook did not take hold.
    """
    original = getattr(Attention, _HOOKED)
    if not getattr(original, _MARK, False):
        if _HOOKED not in getattr(getattr(Attention, _CALLER), "__code__", _NoCode).co_names:
            raise RuntimeError(
                f"vllm-omni's ring cannot be reached: Attention.{_HOOKED} is not called by {_CALLER}; use ring_degree=1, or "
                "a vllm-omni that sp_sparse supports"
            )
        _place(original)
    if not getattr(getattr(Attention, _HOOKED), _MARK, False):
        raise RuntimeError(
            f"sp_sparse's hook on Attention.{_HOOKED} is not in place, and without it a ring runs dense; use ring_degree=1"
        )


class _NoCode:
    co_names: tuple[str, ...] = ()


def _place(original: Callable[..., Tensor]) -> None:
    @functools.wraps(original)
    def run(
        self: Attention, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        ours = getattr(self.attention, _OURS, None)
        if ours is None:
            return original(self, query, key, value, attn_metadata)
        return ours(query, key, value, attn_metadata)

    setattr(run, _MARK, True)
    setattr(Attention, _HOOKED, run)
