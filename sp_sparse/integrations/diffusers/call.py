"""What one forward pass of a Wan transformer knows and its attention processors do not: grid, step, cut of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp_sparse.attention import SparseAttention
from sp_sparse.parallel.collectives import gather_tokens
from sp_sparse.parallel.failures import Standing
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
    """The current forward pass of one transformer. Each transformer has its own, so two experts never mix.

    Attributes:
        is_running: it has begun, and not ended.
        is_within: a layer or the last gather was entered and not left, so its collectives may be half-done.
        layers_done: layers whose attention has run.
        has_left: the tokens of all ranks were gathered.
    """

    def __init__(
        self,
        mesh: SequenceParallelMesh,
        order: str,
        cut: Callable[[VideoGrid], SequenceShards],
        standing: Standing,
    ) -> None:
        """`cut` gives the shards of a grid; `order` is the token order; `standing` hears of lost ranks."""
        self._mesh, self._order, self._cut, self._standing = mesh, order, cut, standing
        self._plans: Recent[tuple[VideoGrid, torch.device], TokenPlan] = Recent(4)
        self._plan: TokenPlan | None = None
        self._step: int | None = None
        self._num_steps: int | None = None
        self._batch = 0
        self._dtypes: dict[str, torch.dtype] = {}
        self.is_running = self.is_within = self.has_left = False
        self.layers_done = 0

    def begin(self, step: int | None, num_steps: int | None) -> None:
        """A forward pass at `step` is about to start."""
        self._plan, self._step, self._num_steps = None, step, num_steps
        self.is_running = self.is_within = self.has_left = False
        self.layers_done = 0

    def plan_for(self, grid: VideoGrid, latents: Tensor) -> None:
        """The forward pass runs, over `grid`, with `latents` `[B, …]`."""
        device = latents.device
        self._plan = self._plans.get((grid, device), lambda: self._order_and_cut(grid, device))
        self._batch, self.is_running = latents.shape[0], True

    def end(self) -> None:
        """The forward pass has ended on this rank."""
        self.is_running = False

    def _order_and_cut(self, grid: VideoGrid, device: torch.device) -> TokenPlan:
        permutation = token_order(grid, self._order)
        shards = self._cut(grid)
        first, last = shards.range_of(self._mesh.sequence_rank)
        local, raster = (torch.from_numpy(x.copy()) for x in (permutation[first:last], inverse_order(permutation)))
        return TokenPlan(grid, shards, local.to(device), raster.to(device))

    def says_lost_rank(self) -> AbstractContextManager[None]:
        """Within it, what a backend says of a lost rank becomes a sentence with the step."""
        where = "a forward" if self._step is None else f"step {self._step} of {self._num_steps} (counted from 0)"
        return self._standing.watch(f"the ranks do not all run {where}")

    @property
    def plan(self) -> TokenPlan:
        if self._plan is None:
            raise RuntimeError("a Wan block was called outside its transformer's forward; call the transformer itself")
        return self._plan

    def attend(self, attention: SparseAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run the layer with what this forward pass knows."""
        plan = self.plan
        with self._collective("layer", query), self.says_lost_rank():
            out = attention(
                query, key, value, grid=plan.grid, step=self._step, num_steps=self._num_steps, shards=plan.shards
            )
        self.layers_done += 1
        return out

    def enter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens, in the token order, of a tensor with all tokens in raster order along `dim`."""
        return x.index_select(dim, self.plan.local)

    def leave(self, x: Tensor) -> Tensor:
        """All tokens in raster order, from this rank's `[B, S_rank, C]`."""
        with self._collective("leave", x), self.says_lost_rank():
            out = gather_tokens(x, self.plan.shards, self._mesh)
        self.has_left = True
        return out.index_select(1, self.plan.raster)

    def zeros(self, shape: tuple[int, ...], place: str, module: nn.Module) -> Tensor:
        """`[B, S_rank, *shape]` in the dtype that was last seen at that place, or else of the weights of `module`."""
        # Of weights in float8 the bias has the dtype.
        own = (p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)
        dtype = self._dtypes.get(place) or next(own)
        tokens = self.plan.shards.lengths[self._mesh.sequence_rank]
        return torch.zeros((self._batch, tokens, *shape), dtype=dtype, device=self.plan.local.device)

    @contextmanager
    def _collective(self, place: str, x: Tensor) -> Iterator[None]:
        """`is_within` stays where an exception leaves it half-done."""
        self._dtypes[place], self.is_within = x.dtype, True
        yield
        self.is_within = False
