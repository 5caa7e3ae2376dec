"""Classifier-free guidance on two halves of the ranks, without a change to the pipeline's loop.

The loop calls the transformer for the conditional branch, then for the unconditional one, and only then combines them.
Ranks of the second half skip the first call, handing back a tensor that is filled when both branches are exchanged at the
end of the second call; the first half skips the second. So the two calls run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sp_sparse.parallel.collectives import all_gather
from sp_sparse.parallel.mesh import SequenceParallelMesh


class BranchParallel:
    """Wraps the forward of one transformer; `branch` tells which branch the current call is for."""

    def __init__(
        self,
        forward: Callable[..., Any],
        mesh: SequenceParallelMesh,
        out_channels: int,
        branch: Callable[[], str | None],
    ) -> None:
        self._forward, self._mesh, self._out_channels, self._branch = forward, mesh, out_channels, branch
        self._waiting: Tensor | None = None

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        branch = self._branch()
        if branch not in ("cond", "uncond") or (branch == "cond") != (self._waiting is None):
            self._waiting = None
            raise RuntimeError(
                f"cfg_degree=2 needs calls in the order cond, uncond, but this one is {branch!r}; turn guidance on for "
                "both experts (guidance_scale above 1), or use cfg_degree=1"
            )
        mine = (branch == "cond") == (self._mesh.cfg_rank == 0)
        if mine:
            out = self._forward(hidden_states, *args, return_dict=False, **kwargs)[0].contiguous()
        else:
            # NaN until the exchange: a loop that reads it too early cannot go unnoticed.
            shape = (hidden_states.shape[0], self._out_channels, *hidden_states.shape[2:])
            out = hidden_states.new_full(shape, float("nan"))
        if branch == "cond":
            self._waiting = out
        else:
            out = self._exchange(out)
        if return_dict:
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=out)
        return (out,)

    def _exchange(self, unconditional: Tensor) -> Tensor:
        conditional, self._waiting = self._waiting, None
        assert conditional is not None  # held since the call for the conditional branch
        mine = conditional if self._mesh.cfg_rank == 0 else unconditional
        assert self._mesh.cfg_group is not None  # BranchParallel is for meshes that have one
        both = all_gather(mine, self._mesh.cfg_group)
        conditional.copy_(both[0])
        return both[1]
