"""The branch of guidance of each call, for a loop that does not tell it: diffusers' video-to-video."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_UNTOLD = "WanVideoToVideoPipeline"


def tells_no_branch(pipeline: Any) -> bool:
    """Whether the loop of `pipeline` calls its transformer outside `cache_context`, the conditional branch first."""
    import diffusers

    return isinstance(pipeline, getattr(diffusers, _UNTOLD))


class BranchesByOrder:
    """Calls of one transformer, each within the `cache_context` of its branch: at a timestep "cond", then "uncond"."""

    def __init__(self, pipeline: Any, model: Any) -> None:
        self._pipeline, self._model = pipeline, model
        self._timestep: Any = None
        self._within: AbstractContextManager[Any] | None = None

    def hooks(self) -> tuple[Callable[[], Any], ...]:
        """What places the hooks that begin and end a call, to be placed before any that needs the branch."""
        return (
            lambda: self._model.register_forward_pre_hook(self._enter),
            lambda: self._model.register_forward_hook(self._leave, always_call=True),
        )

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now = self._pipeline.current_timestep  # a tensor of its own at each step; None outside the loop
        if now is None:
            return
        name = "uncond" if now is self._timestep else "cond"
        self._timestep = now
        within = self._model.cache_context(name)
        within.__enter__()
        self._within = within

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        within, self._within = self._within, None
        if within is not None:
            within.__exit__(*(sys.exc_info() if out is None else (None, None, None)))
