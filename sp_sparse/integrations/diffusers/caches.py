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
from sp_sparse.parallel.mesh import SequenceParallelMesh

# Those that decide from counted steps, texts or the whole latents, of which every rank has the same.
_ALIKE = (
    "FasterCacheConfig",
    "MagCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "SeaCacheConfig",
    "TaylorSeerCacheConfig",
    "TextKVCacheConfig",
)
_FIRST_BLOCK = "FirstBlockCacheConfig"
_DECISION = "_should_compute_remaining_blocks"


class CacheAgreement:
    """Looks at each forward of a transformer for a cache: it may be switched on before or after attention is sparse."""

    def __init__(self, model: Any, mesh: SequenceParallelMesh, undo: ExitStack) -> None:
        self._model, self._undo = model, undo
        self._groups = mesh.sequence_groups

    def told(self) -> object:
        """What of the cache's settings the ranks can compare."""
        config = getattr(self._model, "_cache_config", None)
        return None if config is None else (type(config).__name__, plain(config))

    def prepare(self) -> None:
        """Make the decisions of the cache that is on those of all ranks.

        Raises:
            ValueError: a cache that is not known to decide alike on all ranks.
        """
        config = getattr(self._model, "_cache_config", None)
        kind = type(config).__name__
        if self._groups and config is not None and kind not in (*_ALIKE, _FIRST_BLOCK):
            raise ValueError(
                f"the cache {kind} may decide otherwise on each of the ranks that share the sequence; use one of "
                f"{', '.join((_FIRST_BLOCK, *_ALIKE))}, or call disable_cache()"
            )
        if self._groups and getattr(config, "calibrate", False):
            raise ValueError(f"{kind}(calibrate=True) would measure this rank's tokens alone; calibrate it on one rank")
        registry = getattr(self._model.blocks[0], "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if hasattr(hook, _DECISION) and _DECISION not in hook.__dict__:
                hook.__dict__[_DECISION] = FirstBlockDecision(hook, self._groups)
                self._undo.callback(hook.__dict__.pop, _DECISION, None)


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
