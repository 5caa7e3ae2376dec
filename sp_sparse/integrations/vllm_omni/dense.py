"""vllm-omni's own dense attention, for dense layers and steps and for cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention
from vllm_omni.diffusion.attention.selector import _cached_get_backend_cls as backend_class
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group
from vllm_omni.diffusion.model_metadata import get_diffusion_model_metadata

from sp_sparse.integrations.vllm_omni.registration import BACKEND_NAME


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
