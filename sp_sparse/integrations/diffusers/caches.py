"""diffusers' step caches on ranks that share one sequence: whether to skip is decided by all tokens, not by a rank's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.integrations.diffusers.agree import plain
from sp_sparse.integrations.diffusers.sharded import is_sharded
from sp_sparse.parallel.mesh import SequenceParallelMesh

# Those that decide from counted steps or the whole latents, of which every rank has the same.
_PYRAMID = "PyramidAttentionBroadcastConfig"
_ALIKE = ("MagCacheConfig", _PYRAMID, "SeaCacheConfig", "TaylorSeerCacheConfig")
_FIRST_BLOCK = "FirstBlockCacheConfig"
# Those that are known to do nothing good for Wan, on one rank either.
_NOT_FOR_WAN = {
    "FasterCacheConfig": "wants both guidance branches in one batch, and Wan's pipelines run one after the other",
    "TextKVCacheConfig": "finds no layer of its own in a Wan transformer, and would change nothing",
}
_DECISION = "_should_compute_remaining_blocks"


class CacheAgreement:
    """Looks at each forward of a transformer for a cache: it may be switched on before or after attention is sparse."""

    def __init__(self, model: Any, mesh: SequenceParallelMesh, undo: ExitStack) -> None:
        self._model, self._undo = model, undo
        self._groups, self._halves, self._on_ranks = mesh.sequence_groups, mesh.cfg_degree > 1, bool(mesh.groups)

    def told(self) -> object:
        """What of the cache's settings the ranks can compare."""
        config = getattr(self._model, "_cache_config", None)
        return None if config is None else (type(config).__name__, plain(config))

    def prepare(self) -> None:
        """Make the decisions of the cache that is on those of all ranks.

        Raises:
            ValueError: a cache that is not known to give the result of one rank.
        """
        config = getattr(self._model, "_cache_config", None)
        if self._on_ranks and config is not None:
            self._check(config)
        registry = getattr(self._model.blocks[0], "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if hasattr(hook, _DECISION) and _DECISION not in hook.__dict__:
                hook.__dict__[_DECISION] = FirstBlockDecision(hook, self._groups)
                self._undo.callback(hook.__dict__.pop, _DECISION, None)

    def _check(self, config: Any) -> None:
        kind = type(config).__name__
        known = (_FIRST_BLOCK, *_ALIKE)
        remedy = f"use one of {', '.join(known)}, or call disable_cache()"
        if is_sharded(self._model):
            raise ValueError(
                f"the cache {kind} skips blocks, and weights that FSDP2 has dealt out are gathered for every block on all "
                "ranks; call disable_cache(), or keep the weights whole"
            )
        if kind in _NOT_FOR_WAN:
            raise ValueError(f"the cache {kind} {_NOT_FOR_WAN[kind]}; {remedy}")
        if kind not in known:
            raise ValueError(f"the cache {kind} may decide otherwise on each of the ranks; {remedy}")
        if self._groups and getattr(config, "calibrate", False):
            raise ValueError(f"{kind}(calibrate=True) would measure this rank's tokens alone; calibrate it on one rank")
        if kind == _PYRAMID and self._halves:
            raise ValueError(
                f"{kind} counts the calls of both guidance branches together, so each half of the ranks would reuse "
                "others than one rank does; use cfg_degree=1, or another cache"
            )


class FirstBlockDecision:
    """Of first-block cache: whether the first block's residual changed so much that the other blocks must run.

    The change is that of all ranks' tokens, as one rank with the whole sequence sees it.
    """

    def __init__(self, hook: Any, groups: Sequence[ProcessGroup]) -> None:
        self._hook, self._groups = hook, groups

    @torch.compiler.disable
    def __call__(self, residual: Tensor) -> bool:
        before = self._hook.state_manager.get_state().head_block_residual
        if before is None:
            return True
        # Sums in float64: how tokens are dealt out must not tip the decision.
        sums = torch.stack([x.abs().sum(dtype=torch.float64) for x in (residual - before, before)])
        for group in self._groups:
            dist.all_reduce(sums, group=group)
        change, size = sums.tolist()  # the cache waits for the device here anyway
        return bool(change > self._hook.threshold * size)
