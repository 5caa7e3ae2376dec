"""Sparse self-attention of one layer, between what vllm-omni's strategies do before and after an attention call.

vllm-omni's Ulysses has already given this rank every token of some heads (of its ring shard, in a hybrid), and takes them
back afterwards; its all-gather-KV has gathered the keys. What is left is the ring, which `SparseAttention` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.platforms import current_omni_platform

from sp_sparse.attention import SparseAttention
from sp_sparse.integrations.vllm_omni.context import Call, OmniMesh, Place
from sp_sparse.integrations.vllm_omni.omni_attention import DenseAttention, require_ring_hook
from sp_sparse.integrations.vllm_omni.settings import Settings
from sp_sparse.parallel.agreement import says_lost_rank
from sp_sparse.recent import Recent
from sp_sparse.recorder import AttentionRecorder
from sp_sparse.video import VideoGrid, inverse_order, token_order

# A child of vllm-omni's log, which shows no other's at INFO.
logger = init_logger("vllm_omni.sp_sparse")


class SparseSelfAttention:
    """One layer's attention: sparse, or vllm-omni's own where the settings say dense.

    Attributes:
        layer: number of the layer, None where its name holds none.
        settings: what is sparse, and how.
        mesh: vllm-omni's sequence parallelism.
        sparse_calls, dense_calls: how often it ran, by kind.
    """

    def __init__(
        self,
        dense: DenseAttention,
        backend_kwargs: Mapping[str, Any] | None,
        *,
        num_heads: int,
        head_size: int,
        scale: float,
        prefix: str,
    ) -> None:
        """A collective call where ring or all-gather-KV ranks share the sequence.

        Raises:
            ValueError: settings that cannot be served, by the mesh or the kernel.
            RuntimeError: the ring cannot be reached, or ranks differ.
        """
        config = get_current_diffusion_config_or_none()
        self.settings = Settings.read(backend_kwargs, getattr(config, "additional_config", None))
        self.mesh = OmniMesh.of(getattr(config, "parallel_config", None))
        self.layer = _layer_number(prefix)
        self.sparse_calls = self.dense_calls = 0
        self._dense, self._scale, self._head_size = dense, scale, head_size
        self._order = TokenOrder(self.settings.config.token_order)
        self._recorder: AttentionRecorder | None = None
        self._layers: dict[tuple[Place, int], SparseAttention] = {}
        self._told: Recent[str, None] = Recent(64)
        self._check(prefix, config)
        if self.mesh.ring_degree > 1:
            require_ring_hook()
        layer = self._sparse(self.mesh.place, self.mesh.heads(num_heads))
        if config is not None:
            # A kernel that cannot run is refused now rather than at the first request.
            layer.kernel_for(torch.device(current_omni_platform.device_type), config.dtype)

    def local(self, query: Tensor, key: Tensor, value: Tensor, *grid: int) -> Tensor:
        """Attention over a video of `grid` where this rank holds every token of some heads, or its queries and all keys."""
        call = self._call(query, grid)
        tokens, padded = call.grid.num_tokens, self.mesh.padded(call.grid.num_tokens)
        gathered = self.mesh.place == "allgather" and (query.shape[1], key.shape[1]) == (
            padded // self.mesh.allgather_degree,
            padded,
        )
        if not gathered and (query.shape[1] not in (tokens, padded) or key.shape[1] != query.shape[1]):
            raise ValueError(
                f"SP_SPARSE was called with {query.shape[1]} queries and {key.shape[1]} keys of a video of {tokens} tokens "
                f"{call.grid.shape} under {self.mesh}, where {self.mesh.expected(tokens)}: choose another attention backend"
            )
        # Views without what vllm-omni padded, which is never attended.
        q, k, v = query if gathered else query[:, :tokens], key[:, :tokens], value[:, :tokens]
        if self._is_dense(call):
            out = self._dense.local(q, k, v, call.metadata())
        elif gathered:
            out = self._attend("allgather", q, k, v, call)
        else:
            q, k, v = (self._order.enter(x, call.grid) for x in (q, k, v))
            out = self._order.leave(self._attend("local", q, k, v, call), call.grid)
        if out.shape[1] == query.shape[1]:
            return out
        return torch.cat([out, out.new_zeros(out.shape[0], query.shape[1] - out.shape[1], *out.shape[2:])], 1)

    def ring(self, query: Tensor, key: Tensor, value: Tensor, *grid: int) -> Tensor:
        """Attention over a video of `grid` of this ring shard's queries, some heads of them, and the keys of all ranks."""
        call = self._call(query, grid)
        if self._is_dense(call):
            return self._dense.ring(query, key, value, call.metadata())
        return self._attend("ring", query, key, value, call)

    def record(self, recorder: AttentionRecorder | None) -> None:
        """Measure the densities of the sparse calls from now on, or with None no more."""
        self._recorder = recorder
        for layer in self._layers.values():
            layer.recorder = recorder

    def kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the kernel that attends such tensors on the mesh."""
        (layer, *_) = self._layers.values()
        return layer.kernel_for(device, dtype).info.name

    def _check(self, prefix: str, config: Any) -> None:
        order = self.settings.config.token_order
        if self.mesh.place != "local" and order != "raster":
            raise ValueError(
                f"token_order {order!r} needs every token on one rank, but under {self.mesh} vllm-omni cuts the sequence in "
                "raster order; use token_order raster, or Ulysses alone"
            )
        if self.layer is None and self.settings.depends_on_layer:
            raise ValueError(
                f"layer {prefix!r} has no number, by which skip_layers and the schedule go; leave them out"
            )
        if getattr(getattr(config, "parallel_config", None), "mask_sp_padding", False):
            raise ValueError("mask_sp_padding masks what SP_SPARSE never attends anyway; leave it out")

    def _call(self, query: Tensor, grid: tuple[int, ...]) -> Call:
        frames, height, width = grid
        call = Call.now(frames, height, width)
        if self.layer == 0:  # once a forward, before one rank runs dense and another sparse
            self.mesh.check_call(call, query)
        return call

    def _density(self, call: Call) -> float:
        return self.settings.density(self.layer, call.step, call.num_steps)

    def _is_dense(self, call: Call) -> bool:
        dense = self._density(call) >= 1.0
        if dense:
            self.dense_calls += 1
            self._tell(call, f"dense by {self._dense.name}, as its settings say")
        return dense

    def _attend(self, place: Place, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        layer, shards = self._sparse(place, query.shape[2]), self.mesh.shards(place, call.grid.num_tokens)
        with says_lost_rank(f"layer {self.layer} is not attended by all ranks"):
            out = layer(
                query,
                key,
                value,
                grid=call.grid,
                step=call.step,
                num_steps=self.settings.total(call.num_steps),
                shards=shards,
                scale=self._scale,
            )
        self.sparse_calls += 1
        kernel, exchange = layer.kernel_for(query.device, query.dtype).info.name, layer.kv_exchange(query, shards)
        how = f"sparse by kernel {kernel}, density {self._density(call):.3g}"
        self._tell(call, how + (f", keys and values by {exchange}" if exchange else ""))
        return out

    def _sparse(self, place: Place, heads: int) -> SparseAttention:
        """The layer for a rank's heads; vllm-omni may also call outside what it shards, with every token and head."""
        if (place, heads) not in self._layers:
            self._layers[place, heads] = SparseAttention(
                self.settings.config,
                self.mesh.groups(place),
                num_heads=heads,
                head_dim=self._head_size,
                layer=self.layer or 0,
                recorder=self._recorder,
                all_gather_kv=place == "allgather",
                check_calls=False,  # compared once a forward, without waiting for the device
            )
        return self._layers[place, heads]

    def _tell(self, call: Call, how: str) -> None:
        """Once a layer for each grid and way, of the first layer at INFO."""
        rank = dist.get_rank() if dist.is_initialized() else 0  # lines of several workers may run into one another
        text = f"SP_SPARSE rank {rank} layer {self.layer}, video {call.grid.shape} under {self.mesh}: {how}"
        self._told.get(text, lambda: (logger.debug if self.layer else logger.info)(text))


def _layer_number(prefix: str) -> int | None:
    try:
        return extract_layer_index(prefix)
    except (AssertionError, ValueError):
        return None


class TokenOrder:
    """Puts tokens in an order other than raster and back, on each call, where a rank holds every token.

    Rotary embedding has been applied by then, so only which tokens share a block depends on the order. The indices stay
    on the device.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def enter(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """`[B, S, H, D]` from raster order."""
        return x if self._name == "raster" else x.index_select(1, _order_indices(grid, self._name, x.device)[0])

    def leave(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """`[B, S, H, D]` back to raster order."""
        return x if self._name == "raster" else x.index_select(1, _order_indices(grid, self._name, x.device)[1])


@lru_cache(maxsize=4)
def _order_indices(grid: VideoGrid, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Into the order and back, int64 `[S]`; one plan for all layers, of the videos that came last."""
    permutation = token_order(grid, name)
    there, back = (torch.from_numpy(x.copy()).to(device) for x in (permutation, inverse_order(permutation)))
    return there, back
