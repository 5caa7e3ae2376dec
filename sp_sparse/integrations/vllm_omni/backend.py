"""SP_SPARSE as vllm-omni sees it: an attention backend and its implementation for one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata

from sp_sparse.integrations.opaque import OpaqueCall
from sp_sparse.integrations.vllm_omni.context import video_grid
from sp_sparse.integrations.vllm_omni.registration import BACKEND_NAME
from sp_sparse.integrations.vllm_omni.versions import check_interface, check_version


class SparseAttentionBackend(AttentionBackend):
    """Block-sparse self-attention; cross-attention stays dense."""

    @classmethod
    def validate_available(cls) -> None:
        """Refuse an unknown vllm-omni before it builds the model."""
        check_version()

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """True, without which vllm-omni refuses to pad a sequence. No mask is taken: padding is known without one."""
        return True

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparseAttentionImpl]:
        return SparseAttentionImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # any; the kernel is asked for the layer's


class SparseAttentionImpl(AttentionImpl):
    """Attention of one layer: `SparseSelfAttention` for role `self`, vllm-omni's own dense attention for role `cross`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        role: str = "self",
        **extra_impl_args: Any,
    ) -> None:
        """Called by vllm-omni's attention layer. A collective call of role `self` where a sequence is shared by ranks.

        Raises:
            RuntimeError: an unknown vllm-omni, one whose inner parts have changed, or in which the ring cannot be reached.
            ValueError: settings, or a layer, that cannot be served.
        """
        check_version()
        check_interface()
        # Only now: another version may lack what they import.
        from sp_sparse.integrations.vllm_omni.omni_attention import DenseAttention
        from sp_sparse.integrations.vllm_omni.self_attention import SparseSelfAttention

        if role not in ("self", "cross"):
            raise ValueError(
                f"{BACKEND_NAME} serves self-attention, and layer {prefix!r} has role {role!r}; choose it for that role "
                'alone: --diffusion-attention-config \'{"per_role": {"self": {"backend": "SP_SPARSE"}}}\''
            )
        self.dense = DenseAttention(
            role=role,
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )
        self.sparse: SparseSelfAttention | None = None
        if role == "self":
            if causal or num_kv_heads not in (None, num_heads) or qkv_layout != "BSND":
                raise ValueError(
                    f"{BACKEND_NAME} takes attention that is not causal, with as many key as query heads, laid out as BSND; "
                    f"layer {prefix!r} has causal={causal}, {num_heads} query and {num_kv_heads} key heads, "
                    f"qkv_layout={qkv_layout!r}; choose another backend for this model"
                )
            self.sparse = SparseSelfAttention(
                self.dense, backend_kwargs, num_heads=num_heads, head_size=head_size, scale=softmax_scale, prefix=prefix
            )

            # Opaque to torch.compile: what a call does depends on the denoising step.
            self._local, self._ring = OpaqueCall(self.sparse.local), OpaqueCall(self.sparse.ring)

    def forward_cuda(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """`[B, S, H, D]` each -> `[B, S, H, D]`: every token of some heads, or under all-gather-KV this rank's queries."""
        if self.sparse is None:
            return self.dense.local(query, key, value, attn_metadata)
        return self._local(query, key, value, *video_grid(attn_metadata))

    def sp_sparse_ring(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        """`[B, S / R, H, D]` each -> the same; called by the hook of `omni_attention` in place of vllm-omni's ring."""
        if self.sparse is None:
            return self.dense.ring(query, key, value, attn_metadata)
        return self._ring(query, key, value, *video_grid(attn_metadata))
