"""Block-sparse attention that is the same on every mesh: the layer."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.kernels.base import Kernel
from sp_sparse.kernels.dense import attend_mask
from sp_sparse.kernels.registry import KernelRequest, check_returns_lse, load_kernel, select_kernel
from sp_sparse.mask import BlockMask
from sp_sparse.parallel.all_gather_kv import AllGatherKVStrategy, CallerAllGatherKVStrategy
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import SequenceParallelStrategy
from sp_sparse.recorder import AttentionRecorder
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.registry import load_selector
from sp_sparse.selection.static import StaticPlans
from sp_sparse.video import VideoGrid

# How ring ranks come by the others' keys and values.
_STRATEGIES = {"ring": SequenceParallelStrategy, "all_gather": AllGatherKVStrategy}


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
        static_plans: StaticPlans | None = None,
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
            static_plans: the always-kept blocks, planned once for all layers that are given the same; by default its own.
            check_calls: compare step, grid, cut and shapes of each call between the ranks, which waits for the device once
                a call. Leave it out where they are compared once for all layers, as the diffusers integration does.

        Raises:
            ValueError: backend `none`, an unknown backend or selector, one that cannot serve the mesh or the configuration,
                fewer heads than Ulysses ranks.
            RuntimeError: the ranks' arguments differ.
        """
        # First, so that what only one rank would refuse is told to all, and none waits for a rank that has left.
        mesh.check_same("sparse attention settings", (config, num_heads, head_dim, layer, expert))
        if config.backend == "none":
            raise ValueError("backend 'none' means the model's own attention; choose a backend such as 'auto'")
        if all_gather_kv and mesh.ulysses_degree > 1:
            raise ValueError(
                f"all_gather_kv with ulysses_degree={mesh.ulysses_degree}: give a mesh of ring ranks alone"
            )
        if mesh.ring_degree > 1:
            check_returns_lse(config.backend)
        elif config.backend != "auto":
            load_kernel(config.backend)
        self.config = config
        self.num_heads, self.head_dim = num_heads, head_dim
        self.layer, self.expert = layer, expert
        self.selector = load_selector(config)
        strategy = CallerAllGatherKVStrategy if all_gather_kv else _STRATEGIES[config.kv_exchange]
        self.strategy = strategy(mesh, math.lcm(*config.block_size))
        self.strategy.heads(num_heads)
        self._schedule = config.schedule_for(expert)
        self._check_calls = check_calls
        self.recorder = recorder
        self._kernels: dict[tuple[torch.device, torch.dtype], Kernel] = {}
        self._static_plans = StaticPlans(config) if static_plans is None else static_plans

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
            RuntimeError: `check_calls`, and the ranks' calls differ.
        """
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
        kernel = self.kernel_for(query.device, query.dtype)
        attend = partial(attend_mask, kernel, scale)

        masks: list[BlockMask | None] = []
        exchange = self.strategy.exchange(query, key, value, shards)
        # All heads of this rank, or chunk by chunk where that hides communication.
        for q, k, v, ring_shards in exchange:
            mask = None if density >= 1.0 else self._select(q, k, grid, ring_shards, density)
            exchange.give_back(self.strategy.attend(attend, q, k, v, mask, ring_shards))
            masks.append(mask)
        if self.recorder is not None:
            self.recorder.record(self.expert, self.layer, step, masks, kernel.info.name)
        return exchange.out

    def shards(self, grid: VideoGrid | tuple[int, int, int]) -> SequenceShards:
        """The cut that this layer expects by default: ring shards at block edges, as equal as that allows."""
        grid = grid if isinstance(grid, VideoGrid) else VideoGrid(*grid)
        mesh = self.mesh
        return SequenceShards.aligned(grid.num_tokens, self.strategy.block, mesh.ulysses_degree, mesh.ring_degree)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """The kernel that attends tensors of this kind; asking before the first call tells early that there is none.

        Raises:
            ValueError: the configured backend cannot run them; the text says why and names those that can.
        """
        if (device, dtype) not in self._kernels:
            needs_lse = self.mesh.ring_degree > 1
            request = KernelRequest(device, dtype, self.head_dim, self.config.block_size, needs_lse)
            # All layers choose alike: the first tells.
            self._kernels[device, dtype] = select_kernel(self.config.backend, request, log=self.layer == 0)
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
