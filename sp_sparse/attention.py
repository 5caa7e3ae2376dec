"""Block-sparse attention that is the same on every mesh: the layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.kernels.base import Kernel
from sp_sparse.kernels.dense import attend_mask
from sp_sparse.kernels.registry import KernelRequest, auto_reasons, check_returns_lse, load_kernel, select_kernel
from sp_sparse.mask import BlockMask
from sp_sparse.parallel.agreement import RefusedError, every_value, says_lost_rank, together
from sp_sparse.parallel.all_gather_kv import AllGatherKVStrategy, CallerAllGatherKVStrategy
from sp_sparse.parallel.auto_kv import AutoKVStrategy
from sp_sparse.parallel.kv_exchange import KVExchange, KVExchangePlan
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import SequenceParallelStrategy
from sp_sparse.recorder import AttentionRecorder
from sp_sparse.remainder.attend import add_remainder
from sp_sparse.remainder.means import BlockMeans, block_means
from sp_sparse.selection.base import SelectionRequest, Selector
from sp_sparse.selection.registry import load_selector
from sp_sparse.selection.static import StaticPlans
from sp_sparse.video import VideoGrid

T = TypeVar("T")


class SparseAttention:
    """Self-attention of one layer over a sequence that the ranks of a mesh share.

    Whatever the mesh, the block masks are those of a single device that holds the whole sequence, and so is the output,
    to rounding.
    """

    def __init__(
        self,
        config: SparseAttentionConfig,
        mesh: SequenceParallelMesh,
        *,
        num_heads: int,
        head_dim: int,
        layer: int = 0,
        expert: int = 0,
        recorder: AttentionRecorder | None = None,
        all_gather_kv: bool = False,
        like: SparseAttention | None = None,
        check_calls: bool = True,
    ) -> None:
        """A collective call on meshes of several ranks, which compare their arguments.

        Args:
            config: what is sparse, and how.
            mesh: the process groups.
            num_heads: heads `H` of the whole layer; they need not divide by the Ulysses degree.
            head_dim: head dimension `D`.
            layer: number of the layer, for the schedule.
            expert: 0, or 1 for the second (low-noise) expert of Wan 2.2.
            recorder: counts calls and measures densities; None measures nothing.
            all_gather_kv: the ranks of the mesh, a ring without Ulysses, share the queries, but each call brings the keys
                and values of the whole sequence without padding.
            like: another layer of the same configuration, mesh and head dimension, with which this one shares the kernel and
                the plans of always-kept blocks and of the exchange; by default it has its own.
            check_calls: compare step, grid, cut and shapes of each call between the ranks, which waits for the device once
                a call, and say of a lost rank what to do. Leave it out where that is done once for all layers, as the
                diffusers integration does.

        Raises:
            ValueError: backend `none`, an unknown backend or selector, one that cannot serve the mesh or the configuration,
                fewer heads than Ulysses ranks.
            RuntimeError: the ranks' arguments differ, or another rank cannot set up its part.
        """
        # First, so that what only one rank would refuse is told to all, and none waits for a rank that has left.
        arguments = (config, num_heads, head_dim, layer, expert, all_gather_kv, like is None)
        mesh.check_same("sparse attention settings", arguments)
        if config.backend == "none":
            raise ValueError("backend 'none' means the model's own attention; choose a backend such as 'auto'")
        if all_gather_kv and mesh.ulysses_degree > 1:
            raise ValueError(
                f"all_gather_kv with ulysses_degree={mesh.ulysses_degree}: give a mesh of ring ranks alone"
            )
        self.config = config
        self.num_heads, self.head_dim = num_heads, head_dim
        self.layer, self.expert = layer, expert
        self.selector = (
            load_selector(config)
            if like is not None
            else _on_all_ranks(lambda: load_names(config, mesh.ring_degree), mesh.groups)
        )
        self._schedule = config.schedule_for(expert)
        self._check_calls = check_calls
        self.recorder = recorder
        self._kernels: dict[tuple[torch.device, torch.dtype], Kernel] = {}
        self._static_plans, self._exchange_plan = StaticPlans(config), KVExchangePlan()
        if like is not None:
            if (like.config, like.mesh, like.head_dim) != (config, mesh, head_dim):
                raise ValueError("like= names a layer of another configuration, mesh or head dimension; leave it out")
            self._kernels, self._static_plans = like._kernels, like._static_plans
            self._exchange_plan = like._exchange_plan
        self.strategy = self._strategy(mesh, all_gather_kv)
        self.strategy.heads(num_heads)

    def _strategy(self, mesh: SequenceParallelMesh, all_gather_kv: bool) -> SequenceParallelStrategy:
        """How ring ranks come by the others' keys and values."""
        block, asked = math.lcm(*self.config.block_size), self.config.kv_exchange
        if all_gather_kv:
            return CallerAllGatherKVStrategy(mesh, block)
        if asked == "auto":
            return AutoKVStrategy(mesh, block, plan=self._exchange_plan, num_heads=self.num_heads)
        return (AllGatherKVStrategy if asked == "all_gather" else SequenceParallelStrategy)(mesh, block)

    @property
    def mesh(self) -> SequenceParallelMesh:
        return self.strategy.mesh

    @torch.compiler.disable
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: VideoGrid | tuple[int, int, int],
        step: int | None = None,
        num_steps: int | None = None,
        shards: SequenceShards | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens over the whole sequence.

        Args:
            query, key, value: this rank's shard `[B, S_rank, H, D]`, in the token order of the config.
            grid: tokens of the whole video along time, height and width.
            step, num_steps: denoising step and number of steps; needed by schedules that change with the step.
            shards: the cut of the sequence over the ranks; by default `self.shards(grid)`.
            scale: factor on the scores; by default `D ** -0.5`.

        Returns:
            `[B, S_rank, H, D]` in the dtype of `query`.

        Raises:
            ValueError: shapes that do not fit the layer, the grid or the shards; a kernel that cannot run these inputs.
            RuntimeError: `check_calls`, and the ranks' calls differ, or another rank was lost (`LostRankError`).
        """
        with says_lost_rank(f"layer {self.layer} is not attended by all ranks") if self._check_calls else nullcontext():
            return self._attend(query, key, value, grid, step, num_steps, shards, scale)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: VideoGrid | tuple[int, int, int],
        step: int | None,
        num_steps: int | None,
        shards: SequenceShards | None,
        scale: float | None,
    ) -> Tensor:
        """The call, top to bottom."""
        grid = grid if isinstance(grid, VideoGrid) else VideoGrid(*grid)
        shards = shards or self.shards(grid)
        if self._check_calls:
            # First, so that what only one rank would refuse is told to all.
            told = {
                "step": step,
                "number of steps": num_steps,
                "grid": grid.shape,
                "scale": scale,
                "shards": shards.lengths,
            }
            sizes = {"batch": query.shape[0], "heads and dimension": tuple(query.shape[2:]), "dtype": query.dtype}
            self.mesh.check_call({**told, **sizes}, query.device)
        self._check(query, key, value, grid, shards)
        density = self._schedule.density(self.layer, step, num_steps)
        scale = self.head_dim**-0.5 if scale is None else scale
        # Only with the ranks that make this call: those of another guidance half make one of their own.
        kernel = self._agreed_kernel(query.device, query.dtype, self.mesh.sequence_groups)
        attend = partial(attend_mask, kernel, scale)

        masks: list[BlockMask | None] = []
        exchange = self.strategy.exchange(query, key, value, shards)
        # All heads of this rank, or chunk by chunk where that hides communication.
        for q, k, v, ring_shards in exchange:
            mask = None if density >= 1.0 else self._select(q, k, grid, ring_shards, density)
            means = None if mask is None else self._left_out(k, v, ring_shards)
            out, lse = self.strategy.attend(attend, q, k, v, mask, ring_shards)
            if mask is not None and means is not None:
                out = add_remainder(out, lse, q, means, mask, scale)
            exchange.give_back(out)
            masks.append(mask)
        if self.recorder is not None:
            kv_exchange = self.kv_exchange(query, shards, dense=density >= 1.0)
            self.recorder.record(self.expert, self.layer, step, masks, kernel.info.name)
            if kv_exchange is not None:
                self.recorder.record_exchange(kv_exchange)
        return exchange.out

    def shards(self, grid: VideoGrid | tuple[int, int, int]) -> SequenceShards:
        """The cut that this layer expects by default: ring shards at block edges, as equal as that allows.

        Warns where that leaves ring ranks without tokens.
        """
        grid = grid if isinstance(grid, VideoGrid) else VideoGrid(*grid)
        mesh, block = self.mesh, self.strategy.block
        shards = SequenceShards.aligned(grid.num_tokens, block, mesh.ulysses_degree, mesh.ring_degree)
        idle = sum(length == 0 for length in shards.grouped(mesh.ulysses_degree).lengths)
        if idle:
            query_block, key_block = self.config.block_size
            warnings.warn(
                f"{idle} of {mesh.ring_degree} ring ranks have no tokens: {grid.num_tokens} tokens are cut at multiples of "
                f"{block}, which blocks of {query_block}x{key_block} need; use smaller blocks, blocks of which one divides "
                f"the other, or ring_degree={mesh.ring_degree - idle}",
                stacklevel=2,
            )
        return shards

    def kv_exchange(self, query: Tensor, shards: SequenceShards, dense: bool = False) -> KVExchange | None:
        """How keys and values go over the ring in such calls, and why so.

        With `kv_exchange=auto` a call must have been made before, or `kernel_for` asked, for this device.

        Args:
            query, shards: as a call takes them.
            dense: whether the call has no mask.

        Returns:
            The same on all ranks that share the sequence; None without a ring, or where the caller gathers keys.
        """
        ring_shards = shards.grouped(self.mesh.ulysses_degree).realigned(self.strategy.block)
        return self.strategy.kv_exchange(query, dense, ring_shards)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """The kernel that attends tensors of this kind, the same on all ranks; asking before the first call tells early
        that there is none. A collective call, the first time, on meshes of several ranks.

        Raises:
            ValueError: the configured backend cannot run them; the text says why and names those that can.
            RuntimeError: it cannot on another rank, whose reason is told.
        """
        return self._agreed_kernel(device, dtype, self.mesh.groups)

    def _agreed_kernel(self, device: torch.device, dtype: torch.dtype, groups: Sequence[ProcessGroup]) -> Kernel:
        if (device, dtype) not in self._kernels:
            config = self.config
            needs_lse = self.mesh.ring_degree > 1 or config.remainder != "drop"
            request = KernelRequest(device, dtype, self.head_dim, config.block_size, needs_lse)
            reasons = every_value(auto_reasons(request), groups) if config.backend == "auto" else None
            if isinstance(self.strategy, AutoKVStrategy) and self.mesh.ring_group is not None:
                self._exchange_plan.meet(self.mesh, device, groups)
            # All layers choose alike: the first tells.
            self._kernels[device, dtype] = _on_all_ranks(
                lambda: select_kernel(config.backend, request, self.layer == 0, reasons), groups
            )
        return self._kernels[device, dtype]

    def _select(self, query: Tensor, key: Tensor, grid: VideoGrid, shards: SequenceShards, density: float) -> BlockMask:
        """The mask of this ring shard's query blocks over all key blocks, for the heads of this rank."""
        keys = self.selector.summarize_keys(key)
        if keys is not None:
            keys = self.strategy.gather_blocks(keys, shards, self.config.block_size[1])
        queries = self.selector.summarize_queries(query)
        query_range = shards.range_of(self.mesh.ring_rank)
        static = self._static_plans.blocks(grid, query_range, query.device)
        request = SelectionRequest(
            query.shape[0], query.shape[2], query_range, shards.sequence_length, density, static, grid
        )
        return self.selector.select(queries, keys, request)

    def _left_out(self, key: Tensor, value: Tensor, shards: SequenceShards) -> BlockMeans | None:
        """What stands for key blocks that a mask leaves out, of the whole sequence, for the heads of this rank."""
        config = self.config
        if config.remainder == "drop":
            return None
        block = config.block_size[1]
        means = block_means(key, value, block, linear=config.remainder == "linear")
        tokens = self.strategy.gather_blocks(means.tokens, shards, block)
        return BlockMeans(tokens, None if means.slope is None else self.strategy.sum_shards(means.slope))

    def _check(self, query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid, shards: SequenceShards) -> None:
        if query.ndim != 4 or query.shape[2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"query has shape {tuple(query.shape)}, but this layer takes [B, S, {self.num_heads}, {self.head_dim}]"
            )
        shape = (query.shape[0], self.strategy.key_tokens(query.shape[1], shards), *query.shape[2:])
        for name, x in (("key", key), ("value", value)):
            if x.shape != shape or x.dtype != query.dtype or x.device != query.device:
                raise ValueError(
                    f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, query is {tuple(query.shape)} {query.dtype} on "
                    f"{query.device}; self-attention takes three alike"
                )
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise ValueError("sparse attention has no backward pass; call it under torch.no_grad()")
        if not query.is_floating_point():
            raise ValueError(f"query is {query.dtype}; attention takes floating-point tensors")
        if shards.sequence_length != grid.num_tokens:
            raise ValueError(
                f"grid {grid.shape} has {grid.num_tokens} tokens, but the shards {shards.lengths} with {shards.padding} "
                f"of padding hold {shards.sequence_length}; pass the grid after patching, and a cut of the same sequence"
            )


def load_names(config: SparseAttentionConfig, ring_degree: int) -> Selector:
    """The selector that a configuration names, once its kernel was found to load and to give what the ring and the
    remainder need.

    Raises:
        ValueError: a name that stands for nothing here, or a kernel without the LSE that is needed.
    """
    if ring_degree > 1:
        check_returns_lse(config.backend, "ring parallelism needs to merge its hops", "ring_degree=1")
    elif config.remainder != "drop":
        check_returns_lse(config.backend, f"remainder={config.remainder!r} needs to be merged", "remainder='drop'")
    elif config.backend != "auto":
        load_kernel(config.backend)
    return load_selector(config)


def _on_all_ranks(action: Callable[[], T], groups: Sequence[ProcessGroup]) -> T:
    """Do something that may fail on some ranks: then all raise, those that could with the reason of one that could not."""
    if not groups:
        return action()
    try:
        return together(action, groups)
    except RefusedError as refused:
        if isinstance(refused.__cause__, Exception):
            raise refused.__cause__ from None
        raise RuntimeError(
            f"sparse attention cannot run on every rank: {refused.failure}; mend it there, or choose what all ranks have"
        ) from None
