"""The contract between a block mask and the code that attends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sp_sparse.mask import BlockMask


@dataclass(frozen=True)
class KernelInfo:
    """What a kernel can do. An empty tuple means "any".

    Attributes:
        name: the name that `--sparse-attn-backend` takes.
        device_types: torch device types, such as `("cuda",)`.
        dtypes: dtypes of query, key and value.
        head_dims: head dimensions.
        block_sizes: (query block, key block) pairs in tokens.
        newer_block_sizes: (compute capability, the pairs among `block_sizes` that GPUs from it on take), ascending; empty
            where all take all.
        min_capability: lowest CUDA compute capability, `(major, minor)`.
        max_capability: highest CUDA compute capability, or None for no limit.
        returns_lse: whether it returns the LSE, which ring parallelism needs to merge its hops.
        extra: the pip extra of sp-sparse that installs it, or "".
    """

    name: str
    device_types: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: tuple[int, ...] = ()
    block_sizes: tuple[tuple[int, int], ...] = ()
    newer_block_sizes: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...] = ()
    min_capability: tuple[int, int] = (0, 0)
    max_capability: tuple[int, int] | None = None
    returns_lse: bool = True
    extra: str = ""


class Kernel(Protocol):
    """Attends a block mask. Instances hold no state that depends on the inputs' values."""

    info: KernelInfo

    def missing(self) -> str | None:
        """Why this kernel cannot run on this machine at all (a package that is not installed, …), or None."""
        ...

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over the key blocks that `mask` keeps.

        Args:
            query: `[B, Sq, H, D]`; any strides with a contiguous last dimension.
            key, value: `[B, Sk, H, D]`, likewise.
            mask: the block mask over `Sq` x `Sk`.
            scale: factor on the scores, before the softmax.

        Returns:
            out: `[B, Sq, H, D]` in the dtype of `query`; 0 for a row that attends nothing.
            lse: log-sum-exp of the scaled scores of each row, natural log, `[B, H, Sq]`, fp32 (fp64 for fp64 inputs);
                `-inf` for a row that attends nothing. None only where `info.returns_lse` is False.
        """
        ...
