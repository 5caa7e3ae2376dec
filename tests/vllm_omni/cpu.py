"""vllm-omni 0.30 on a CPU, where it has no platform: what its Wan transformer needs there, and no more.

Must be installed before anything of vllm-omni but `vllm_omni.platforms` is imported: modules copy the platform's handle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launch.benchmarks.omni_model import do_without_compiled_parts


def install(pipelines: bool = False) -> None:
    """Put the CPU platform, attention on it, and its dense ring in place. Calling it again does nothing.

    Args:
        pipelines: whole ones, not the transformer alone.
    """
    do_without_compiled_parts(pipelines)
    import vllm_omni.platforms as platforms

    if type(platforms._current_omni_platform).__name__ == "CpuPlatform":
        return
    platforms._current_omni_platform = _cpu_platform()
    _dispatch_attention()
    _dense_ring()


def _cpu_platform() -> Any:
    from vllm.platforms.interface import PlatformEnum
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class CpuPlatform(OmniPlatform):
        _omni_enum = OmniPlatformEnum.OOT
        _enum = PlatformEnum.UNSPECIFIED
        device_type = device_name = "cpu"
        dist_backend = "gloo"

        @classmethod
        def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
            return torch.device("cpu")

        @classmethod
        def get_device_count(cls) -> int:
            return 1

        @classmethod
        def set_device(cls, device: Any) -> None:
            return None

        @classmethod
        def synchronize(cls) -> None:
            return None

        @classmethod
        def get_diffusion_attn_backend_cls(
            cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
        ) -> str:
            from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

            name = (selected_backend or "TORCH_SDPA").upper()
            cls.validate_diffusion_attn_backend(name)
            return DiffusionAttentionBackendEnum[name].get_path()

    return CpuPlatform()


def _dispatch_attention() -> None:
    """AttentionImpl.forward knows no CPU; what it calls on CUDA is plain torch in the backends used here."""
    from vllm_omni.diffusion.attention.backends.abstract import AttentionImpl

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        return self.forward_cuda(query, key, value, attn_metadata)

    AttentionImpl.forward = forward


def _dense_ring() -> None:
    """Its ring of torch's attention calls an operator that only CUDA has."""
    from vllm_omni.diffusion.attention.backends import ring_pytorch_attn

    from sp_sparse.kernels.dense import dense_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **_: Any) -> tuple[Tensor, Tensor]:
        return dense_attention(q, k, v, softmax_scale)

    ring_pytorch_attn.pytorch_attn_forward = attend
