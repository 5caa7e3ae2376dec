"""FlashInfer's attention over a paged key/value cache, with the blocks of a mask as its pages.

FlashInfer (github.com/flashinfer-ai/flashinfer) serves batches of requests, each with a list of pages of keys and values.
Here a request is one query block of one head of one batch entry and a page is one key block of one head, so every head
has a mask of its own. The length of a request's last page cuts the short block at the sequence's end.
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.checks import check_tensors, missing_package, positive_scale, without_launch
from sp_sparse.mask import BlockMask

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

# Its size is FlashInfer's recommendation.
_WORKSPACE_BYTES = 128 << 20


class FlashInferKernel:
    """Scores, softmax and sums in fp32; FlashInfer's fa3 kernel on compute capability 9.0, fa2 below.

    A mask is *planned* before it is attended: its table goes to the host, which waits for the device, and is shared out
    among multiprocessors there, milliseconds of host time. Calls with the same mask object reuse the plan as long as no
    other mask comes between; masks that are new in every layer, as ours are, pay for it every time. That is why `auto`
    prefers kernels that read lists on the device, and why a call cannot be captured in a CUDA graph.

    Keys, values and queries are copied once a call into the layout of pages, `[B, H, S, D]`. The first call for a dtype
    and head dimension compiles for a minute or more, with the machine's nvcc, unless flashinfer-jit-cache is installed.
    """

    info = KernelInfo(
        name="flashinfer",
        device_types=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(64, 128),
        block_sizes=((128, 128), (128, 64), (64, 128), (64, 64)),
        min_capability=(8, 0),
        max_capability=(9, 0),
        extra="flashinfer",
    )

    def missing(self) -> str | None:
        return missing_package("flashinfer-python", "flashinfer", "0.7.2", "flashinfer")

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        check_tensors(query, key, value, mask)
        result = without_launch(query, mask)
        if result is not None:
            return result
        query, scale = positive_scale(query, scale)
        batch, length, heads, head_dim = query.shape
        with torch.cuda.device_of(query):
            wrapper = self.plan(query, mask, scale)
            # A copy even where none is needed for the layout: the kernel wants addresses that are multiples of 16 bytes.
            rows = query.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(-1, 1, head_dim)
            pages = (to_pages(key, mask.block_size[1]), to_pages(value, mask.block_size[1]))
            out, lse = wrapper.run(rows, pages, out=torch.empty_like(rows), return_lse=True)
        # FlashInfer's LSE is a logarithm to base 2.
        lse = lse.view(batch, heads, length).mul_(math.log(2))
        return out.view(batch, heads, length, head_dim).transpose(1, 2), lse

    def plan(self, query: Tensor, mask: BlockMask, scale: float) -> BatchPrefillWithPagedKVCacheWrapper:
        """FlashInfer's wrapper, planned for queries like `query` under `mask`. Waits for the device if it plans anew."""
        backend = "fa3" if torch.cuda.get_device_capability(query.device) >= (9, 0) else "fa2"
        stream = torch.cuda.current_stream(query.device).cuda_stream
        return _planner(query.device, stream, backend).plan(mask, query.shape[3], query.dtype, scale)


@dataclass(frozen=True)
class PageTable:
    """Requests over pages. Request `(b * H + h) * Nq + i` is query block `i`, page `(b * H + h) * Nk + j` key block `j`.

    Attributes:
        query_starts: int32 `[requests + 1]` on the host, where each request's rows begin among the `B * H * Sq` rows.
        page_starts: int32 `[requests + 1]`, where each request's pages begin in `pages`.
        pages: int32, the page numbers of all requests.
        last_page_lengths: int32 `[requests]`, keys in each request's last page; 0 for a request without pages.
    """

    query_starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last_page_lengths: Tensor


def page_table(mask: BlockMask) -> PageTable:
    """The requests of a mask with at least one column. Synchronises: how many pages there are is known on the device."""
    batch, heads, rows, width = mask.indices.shape
    device = mask.indices.device
    query_starts = torch.arange(batch * heads).unsqueeze(1) * mask.query_length
    query_starts = (query_starts + torch.arange(rows) * mask.block_size[0]).flatten()
    counts = mask.counts.flatten()
    blocks = mask.indices.reshape(-1, width)
    used = torch.arange(width, device=device) < counts.unsqueeze(1)
    first_page = torch.arange(batch * heads, dtype=torch.int32, device=device) * mask.num_key_blocks
    last = blocks.gather(1, (counts - 1).clamp_(min=0).long().unsqueeze(1)).squeeze(1)
    tail = mask.key_length - (mask.num_key_blocks - 1) * mask.block_size[1]
    lengths = torch.where(last == mask.num_key_blocks - 1, tail, mask.block_size[1])
    return PageTable(
        query_starts=F.pad(query_starts, (0, 1), value=batch * heads * mask.query_length).int(),
        page_starts=F.pad(counts.cumsum(0), (1, 0)).int(),
        pages=(blocks + first_page.repeat_interleave(rows).unsqueeze(1))[used],
        last_page_lengths=torch.where(counts > 0, lengths, 0).int(),
    )


def to_pages(x: Tensor, size: int) -> Tensor:
    """`[B, S, H, D]` -> `[B * H * N, size, 1, D]`, the last block of each head filled up with zeros; always a copy."""
    batch, length, heads, head_dim = x.shape
    padded = length + -length % size
    pages = torch.empty(batch, heads, padded, head_dim, dtype=x.dtype, device=x.device)
    pages[:, :, :length].copy_(x.transpose(1, 2))
    pages[:, :, length:].zero_()
    return pages.view(-1, size, 1, head_dim)


class _Planner:
    """A wrapper and what it is planned for. One a device and stream for all layers: its buffers are large."""

    def __init__(self, device: torch.device, backend: str) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        self._mask: weakref.ref[BlockMask] | None = None
        self._kind: tuple[int, torch.dtype, float] | None = None

    def plan(
        self, mask: BlockMask, head_dim: int, dtype: torch.dtype, scale: float
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        kind = (head_dim, dtype, scale)
        if self._mask is not None and self._mask() is mask and self._kind == kind:
            return self._wrapper
        # Forgotten first: a plan that fails half-way is nobody's.
        self._mask = None
        table = page_table(mask)
        self._wrapper.plan(
            table.query_starts, table.page_starts, table.pages, table.last_page_lengths,
            num_qo_heads=1, num_kv_heads=1, head_dim_qk=head_dim, page_size=mask.block_size[1],
            causal=False, sm_scale=scale, q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip
        self._mask, self._kind = weakref.ref(mask), kind
        return self._wrapper


@functools.cache
def _planner(device: torch.device, stream: int, backend: str) -> _Planner:
    # One a stream: a plan on one stream must not overwrite the buffers that a kernel on another still reads.
    return _Planner(device, backend)
