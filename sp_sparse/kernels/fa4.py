"""FlashAttention-4's block-sparse forward for Hopper and Blackwell (CuTe DSL: TMA loads, wgmma or tcgen05 instructions).

The package flash-attn-4 (github.com/Dao-AILab/flash-attention, `flash_attn/cute`) reads lists of key blocks on the
device: nothing is planned and nothing synchronises. Its rules on compute capability 9.0, from its sources at 4.0.0b36:

* There are two lists, blocks to mask and full blocks, and both must be there. Ours are all full: the kernel itself cuts
  the last key block at the sequence's end.
* It does so only in the last block of a list, so lists must ascend, as a `BlockMask`'s do.
* The block size must be told; with a short last block the package could not infer it.
* The key block is the kernel's key tile; a query block of 64 runs in tiles of 64, one of 128 or 256 in tiles of 128.
* A row without blocks gets output 0 and LSE -inf.

On compute capability 10.x the rules are the same but for the block size, which is 256x128: two query tiles of 128 are
computed at a time. 8.x and 12.x have no block sparsity there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.checks import check_tensors, missing_package, positive_scale, without_launch
from sp_sparse.mask import BlockMask


class FA4Kernel:
    """Scores, softmax and sums in fp32; the weights are rounded to the dtype of `value` before they meet it.

    The first call for a dtype, head dimension and block size compiles for some seconds; other lengths, heads and masks
    reuse it. Tensors whose strides or address are not multiples of 16 bytes are copied by the package.
    """

    info = KernelInfo(
        name="fa4",
        device_types=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(64, 96, 128),
        block_sizes=((128, 128), (128, 64), (64, 128), (64, 64), (256, 128)),
        newer_block_sizes=(((10, 0), ((256, 128),)),),
        min_capability=(9, 0),
        max_capability=(10, 3),
        extra="fa4",
    )

    def missing(self) -> str | None:
        return missing_package("flash-attn-4", "flash_attn.cute", "4.0.0b36", "fa4")

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        check_tensors(query, key, value, mask)
        result = without_launch(query, mask)
        if result is not None:
            return result
        query, scale = positive_scale(query, scale)

        # The public function: what it adds to the private one below it is an autograd node, microseconds, and its
        # result has kept its shape from release to release.
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        # Without no_grad a gradient could be taken: that of dense attention.
        with torch.cuda.device_of(query), torch.no_grad():
            lists = BlockSparseTensorsTorch(**block_lists(mask), block_size=mask.block_size)
            out, lse = flash_attn_func(
                query, key, value, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True
            )
        return out, lse


def block_lists(mask: BlockMask) -> dict[str, Tensor]:
    """The package's four tables, int32: counts `[B, H, Nq]` and key block numbers `[B, H, Nq, K]`, to mask and full."""
    none = _zeros(tuple(mask.counts.shape), mask.counts.device)
    return {
        "mask_block_cnt": none,
        # A table needs a column, even if no row reads it.
        "mask_block_idx": none.unsqueeze(-1),
        "full_block_cnt": mask.counts.contiguous(),
        "full_block_idx": mask.indices if mask.indices.stride(3) == 1 else mask.indices.contiguous(),
    }


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # Zeroed only when the graph replays, so of no use to anyone else.
            return torch.zeros(shape, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    return _kept_zeros(shape, device, stream)


@functools.lru_cache(maxsize=64)
def _kept_zeros(shape: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    # One a stream: another stream could read them before they are zeroed.
    return torch.zeros(shape, dtype=torch.int32, device=device)
