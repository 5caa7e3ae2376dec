"""The Triton kernel: block-sparse attention on CUDA GPUs from compute capability 8.0, with no compiled extension.

FlashAttention-2's online softmax (arXiv 2307.08691) over each query block's list of key blocks. On compute capability
9.0 and later tiles are fetched by the copy engine (TMA tensor descriptors), elsewhere by plain loads.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.checks import check_tensors, positive_scale, without_launch
from sp_sparse.kernels.triton_config import launch_config
from sp_sparse.mask import BlockMask

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2_E = math.log2(math.e)


class TritonKernel:
    """Scores, softmax and sums in fp32; the weights are rounded to the dtype of `value` before they meet it.

    Args:
        tma: use TMA descriptors where the device has them and strides and alignment permit; False never does.
    """

    info = KernelInfo(
        name="triton",
        device_types=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(64, 128),
        block_sizes=((128, 128), (128, 64), (64, 128), (64, 64)),
        min_capability=(8, 0),
    )

    def __init__(self, tma: bool = True) -> None:
        self._tma = tma

    def missing(self) -> str | None:
        return None if find_spec("triton") else "triton is not installed; pip install triton"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        check_tensors(query, key, value, mask)
        result = without_launch(query, mask)
        if result is not None:
            return result
        query, scale = positive_scale(query, scale)
        batch, query_length, heads, head_dim = query.shape
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(batch, heads, query_length, dtype=torch.float32, device=query.device)

        from sp_sparse.kernels.triton_forward import attend_blocks

        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
        tma = self._tma and (capability >= (9, 0) or not query.is_cuda) and all(map(_describable, (query, key, value)))
        config = launch_config(mask.block_size, head_dim, tma, capability)
        sources: list[Tensor] | list[TensorDescriptor] = [query, key, value]
        if tma:
            sources = [
                _descriptor(x, size)
                for x, size in zip((query, key, value), (mask.block_size[0], config.tile, config.tile), strict=True)
            ]
        with torch.cuda.device_of(query):
            attend_blocks[(mask.num_query_blocks, heads, batch)](
                *sources, out, lse, mask.indices, mask.counts,
                *_strides(query)[:3], *_strides(key)[:3], *_strides(value)[:3], *out.stride()[:3], *lse.stride()[:2],
                *mask.indices.stride(), *mask.counts.stride(), query_length, key.shape[1], scale * _LOG2_E,
                TMA=tma, QUERY_BLOCK=mask.block_size[0], KEY_BLOCK=mask.block_size[1], HEAD_DIM=head_dim,
                KEY_TILE=config.tile, num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
                enable_fp_fusion=True,
            )  # fmt: skip
        return out, lse


def _strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is arbitrary; as 0 it hides no alignment from the compiler.
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


def _describable(x: Tensor) -> bool:
    """Whether a TMA descriptor can address `x`: 16-byte aligned, positive strides that are multiples of 16 bytes."""
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in strides)


def _descriptor(x: Tensor, tokens: int) -> TensorDescriptor:
    """`x`, `[B, S, H, D]`, as `[B, H, S, D]` in tiles of `tokens` tokens of one head; 0 is read past the end."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, length, heads, head_dim = x.shape
    # A descriptor wants a valid stride for a dimension of size 1 too.
    stride = [head_dim if step == 0 else step for step in _strides(x)]
    return TensorDescriptor(
        x, [batch, heads, length, head_dim], [stride[0], stride[2], stride[1], 1], [1, 1, tokens, head_dim]
    )
