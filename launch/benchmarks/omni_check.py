"""The invariant through vllm-omni's own attention layer: its strategies, groups and padding, our hook and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launch.benchmarks.arguments import Mesh
from launch.benchmarks.omni_model import OmniTransformer
from sp_sparse import AttentionRecorder, BlockMask, SequenceShards


@dataclass(frozen=True)
class LayerCall:
    """One call of a self-attention layer on a rank that holds the whole sequence.

    Attributes:
        query, key, value, out: `[B, S, H, D]`.
        mask: bool over blocks, `[B, H, N, N]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    mask: Tensor


def capture_call(transformer: OmniTransformer, latents: Tensor, text: Tensor) -> tuple[LayerCall, Tensor]:
    """The last layer's call of a forward pass on one rank, and what the model gives."""
    attention = transformer.model.blocks[-1].attn1.attn
    calls: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_hook(lambda module, args, out: calls.append((*args[:3], out)))
    with recorded(transformer) as recorder:
        output = transformer(latents, text, step=0)
    hook.remove()
    (call,) = calls
    return LayerCall(call[0], call[1], call[2], call[3], recorder.masks[-1][-1].to_dense()), output


def repeat_call(
    transformer: OmniTransformer, call: LayerCall, grid: tuple[int, int, int], mesh: Mesh, rank: int
) -> Any:
    """The same call on a mesh, each rank with its share of the tokens.

    Returns:
        Whether this rank's mask is that of one rank, bit for bit; and the relative error of its output.
    """
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout

    tokens, (ulysses, ring) = grid[0] * grid[1] * grid[2], mesh
    shards = SequenceShards.equal(tokens, ulysses * ring)
    first, last = shards.range_of(rank)
    padding = shards.lengths[rank] - (last - first)
    local = [
        torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding)) for x in (call.query, call.key, call.value)
    ]
    layout = VideoTokenLayout(prefix_len=0, latent_grid=grid, used_len=tokens)
    with recorded(transformer) as recorder, transformer.context(0):
        out = transformer.model.blocks[-1].attn1.attn(*local, AttentionMetadata(video_layout=layout))
    mask: BlockMask = recorder.masks[-1][-1]
    wanted = _share(call.mask, shards.grouped(ulysses), mask.block_size, mesh, rank)
    same = torch.equal(mask.to_dense()[:, : wanted.shape[1]], wanted)
    return same, relative_error(out[:, : last - first], call.out[:, first:last])


@contextmanager
def recorded(transformer: OmniTransformer) -> Iterator[AttentionRecorder]:
    """Keep the masks of the sparse calls."""
    recorder = AttentionRecorder(keep_masks=True)
    for layer in transformer.sparse_layers():
        layer.record(recorder)
    yield recorder
    for layer in transformer.sparse_layers():
        layer.record(None)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return (difference / expected.float().square().mean().sqrt()).item()


def _share(whole: Tensor, ring_shards: SequenceShards, block_size: tuple[int, int], mesh: Mesh, rank: int) -> Tensor:
    """The heads and query blocks of a rank; vllm-omni rounds the heads of a rank up."""
    ring_rank, ulysses_rank = divmod(rank, mesh[0])
    heads = -(-whole.shape[1] // mesh[0])
    edge = max(block_size)
    first, last = ring_shards.realigned(edge).range_of(ring_rank)
    rows = slice(first // block_size[0], -(-last // block_size[0]))
    return whole[:, ulysses_rank * heads : (ulysses_rank + 1) * heads, rows]
