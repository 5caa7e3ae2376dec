"""What one forward pass of a Wan transformer knows and its attention processors do not: grid, step, cut of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sp_sparse.attention import SparseAttention
from sp_sparse.parallel.agreement import says_lost_rank
from sp_sparse.parallel.collectives import gather_tokens
from sp_sparse.parallel.mesh import SequenceParallelMesh
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.recent import Recent
from sp_sparse.video import VideoGrid, inverse_order, token_order


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """How the tokens of a grid are ordered and cut.

    Attributes:
        grid: tokens along time, height and width.
        shards: the cut over the ranks.
        local: raster numbers of this rank's tokens, int64 `[S_rank]`.
        raster: place in the sequence of each raster token, int64 `[S]`.
    """

    grid: VideoGrid
    shards: SequenceShards
    local: Tensor
    raster: Tensor


class WanCall:
    """The current forward pass of one transformer. Each transformer has its own, so two experts never mix."""

    def __init__(self, mesh: SequenceParallelMesh, order: str, cut: Callable[[VideoGrid], SequenceShards]) -> None:
        """`cut` gives the shards of a grid; `order` is the token order."""
        self._mesh, self._order, self._cut = mesh, order, cut
        self._plans: Recent[tuple[VideoGrid, torch.device], TokenPlan] = Recent(4)
        self._plan: TokenPlan | None = None
        self._step: int | None = None
        self._num_steps: int | None = None

    def begin(self, step: int | None, num_steps: int | None) -> None:
        """A forward pass at `step` starts."""
        self._plan, self._step, self._num_steps = None, step, num_steps

    def plan_for(self, grid: VideoGrid, device: torch.device) -> None:
        """The forward pass is over `grid`."""
        self._plan = self._plans.get((grid, device), lambda: self._order_and_cut(grid, device))

    def _order_and_cut(self, grid: VideoGrid, device: torch.device) -> TokenPlan:
        permutation = token_order(grid, self._order)
        shards = self._cut(grid)
        first, last = shards.range_of(self._mesh.sequence_rank)
        local, raster = (torch.from_numpy(x.copy()) for x in (permutation[first:last], inverse_order(permutation)))
        return TokenPlan(grid, shards, local.to(device), raster.to(device))

    def says_lost_rank(self) -> AbstractContextManager[None]:
        """Within it, what a backend says of a lost rank becomes a sentence with the step."""
        where = "a forward" if self._step is None else f"step {self._step} of {self._num_steps} (counted from 0)"
        return says_lost_rank(f"the ranks do not all run {where}")

    @property
    def plan(self) -> TokenPlan:
        if self._plan is None:
            raise RuntimeError("a Wan block was called outside its transformer's forward; call the transformer itself")
        return self._plan

    def attend(self, attention: SparseAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run the layer with what this forward pass knows."""
        plan = self.plan
        with self.says_lost_rank():
            return attention(
                query, key, value, grid=plan.grid, step=self._step, num_steps=self._num_steps, shards=plan.shards
            )

    def enter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens, in the token order, of a tensor with all tokens in raster order along `dim`."""
        return x.index_select(dim, self.plan.local)

    def leave(self, x: Tensor) -> Tensor:
        """All tokens in raster order, from this rank's `[B, S_rank, C]`."""
        with self.says_lost_rank():
            return gather_tokens(x, self.plan.shards, self._mesh).index_select(1, self.plan.raster)
