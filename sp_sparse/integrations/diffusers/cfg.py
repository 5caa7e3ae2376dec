"""Classifier-free guidance on two halves of the ranks, without a change to the pipeline's loop.

The loop calls the transformer for the conditional branch, then for the unconditional one, and only then combines them.
Ranks of the second half skip the first call, handing back a tensor that is filled when both branches are exchanged at the
end of the second call; the first half skips the second. So the two calls run at the same time.

All ranks meet where a step begins, as the loop enters `cache_context("cond")`, and once where it ends: after its last call
or at an exception within its contexts. So a half that fails is heard by the one that waits for it, and no step is begun
with what another has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sp_sparse.parallel.agreement import check_same, is_lost_rank, largest
from sp_sparse.parallel.failures import Standing
from sp_sparse.parallel.mesh import SequenceParallelMesh


@dataclass(eq=False)
class _Step:
    """A step that has begun and not ended.

    Attributes:
        guided: whether it has two branches.
        skip: makes the collectives that the other half waits for in a forward, where this rank fails to begin its own.
        begun: whether this rank has begun the forward of its branch, which ends for itself.
        conditional: there once the call for that branch has returned.
    """

    guided: bool
    skip: Callable[[], None]
    begun: bool = False
    conditional: Tensor | None = None


class _PipelineGuidance:
    """What the loop of a pipeline goes by."""

    def __init__(self, pipeline: Any) -> None:
        if "do_classifier_free_guidance" not in dir(pipeline):
            raise TypeError(
                "cfg_degree=2 needs to know at each step whether guidance is on, which "
                f"{type(pipeline).__name__} does not tell (do_classifier_free_guidance); pass the pipeline instead of its "
                "transformer, or use cfg_degree=1"
            )
        self._pipeline = pipeline

    def is_on(self) -> bool:
        """Whether the loop calls the transformer for the unconditional branch too."""
        return bool(self._pipeline.do_classifier_free_guidance)

    def at_first_step(self) -> bool:
        """By the scheduler, for loops that do not tell; some count from None. False where it does not count."""
        return not getattr(getattr(self._pipeline, "scheduler", None), "step_index", True)


class GuidanceHalves:
    """The step that the ranks of both halves are at, for all transformers of one pipeline."""

    def __init__(self, mesh: SequenceParallelMesh, pipeline: Any, standing: Standing) -> None:
        """Raises TypeError if `pipeline` does not tell whether guidance is on, as a transformer alone does not."""
        self._mesh, self._guidance, self._standing = mesh, _PipelineGuidance(pipeline), standing
        self._step: _Step | None = None
        self._computing = False

    def watching(
        self, cache_context: Callable[..., Any], prepare: Callable[[], None], skip: Callable[[], None]
    ) -> Callable[..., Any]:
        """`cache_context` that begins steps, and ends them where they fail.

        `prepare` is called before each call, and `skip` where a rank fails before its own.
        """

        @contextmanager
        def watching_context(name: str, **kwargs: Any) -> Iterator[None]:
            if name == "cond":
                self._begin(kwargs.get("step_index"), skip)
            try:
                prepare()
                with cache_context(name, **kwargs):
                    yield
                if name == "cond" and self._step is not None and self._step.guided and not self._guidance.is_on():
                    raise RuntimeError(
                        "guidance was switched off within a step, whose conditional branch this half of the ranks may "
                        "not have; switch it in callback_on_step_end"
                    )
            except Exception as error:
                if self._step is None:  # ended, and told
                    raise
                raised = self._end(error)
                if raised is None or raised is error:
                    raise
                raise raised from error

        return watching_context

    def branch(self, name: str | None, compute: Callable[[], Tensor], like: Tensor, channels: int) -> Tensor:
        """The result `[B, channels, T, H, W]` of one call, from `compute` or the other half; `like` is its input."""
        if self._computing:  # a call within ours: another library's wrapper stands between two of them
            return compute()
        step = self._step
        if step is None or name not in ("cond", "uncond") or (name == "cond") != (step.conditional is None):
            raise RuntimeError(
                f"cfg_degree=2 needs calls in the order cond, uncond, each within its cache_context, but this one is "
                f"{name!r}; use a WanPipeline or WanImageToVideoPipeline, or cfg_degree=1"
            )
        half = 0 if name == "cond" else 1
        if step.guided and self._mesh.cfg_rank != half:
            # NaN until the exchange: a loop that reads it too early cannot go unnoticed.
            out = like.new_full((like.shape[0], channels, *like.shape[2:]), float("nan"))
        else:
            self._computing = step.begun = True
            try:
                # The other half has only its input to know the dtype by.
                out = compute().to(like.dtype).contiguous()
            finally:
                self._computing = False
        if step.guided and name == "cond":
            step.conditional = out
            return out
        raised = self._end(None)
        if raised is not None:
            raise raised
        if step.conditional is not None:
            # In place, so that nothing can fail on one rank only between the meeting and here.
            self._send(step.conditional, 0)
            self._send(out, 1)
        return out

    def _begin(self, step: int | None, skip: Callable[[], None]) -> None:
        self._standing.check()
        if self._step is not None:
            # This rank left that step where nothing watches, between two contexts: the others may still wait in it.
            self._end(RuntimeError("left the step between its two branches"))
        guided = self._guidance.is_on()
        useless = not guided and (self._guidance.at_first_step() if step is None else step == 0)
        told = guided + 2 * useless
        with self._standing.watch("the ranks do not all begin a step with guidance"):
            least, most = largest((-told, told), self._mesh.groups)
            if -least != most:
                check_same("whether guidance is on, or at which step", (guided, step), self._mesh.groups)
        if useless:
            raise RuntimeError(
                "cfg_degree=2 runs the two branches of guidance, but guidance is off at the first step; turn it on "
                "(guidance_scale above 1), or use cfg_degree=1"
            )
        self._step = _Step(guided, skip)

    def _end(self, error: Exception | None) -> Exception | None:
        """The step has ended on this rank, well or by `error`; what to raise if it failed on any. A collective call."""
        step, self._step = self._step, None
        if error is not None and (is_lost_rank(error) or not self._standing.can_meet):
            return error
        if error is not None and step is not None and not step.begun:
            step.skip()
        return self._standing.meet(error, self._mesh.groups, "the ranks did not all end a step with guidance")

    def _send(self, x: Tensor, half: int) -> None:
        group = self._mesh.cfg_group
        assert group is not None  # GuidanceHalves is for meshes that have one
        with self._standing.watch("the ranks did not all exchange their branches of guidance"):
            dist.broadcast(x, dist.get_global_rank(group, half), group=group)


class BranchParallel:
    """Wraps the forward of one transformer; `branch` tells which branch the current call is for."""

    def __init__(
        self,
        forward: Callable[..., Any],
        halves: GuidanceHalves,
        out_channels: int,
        branch: Callable[[], str | None],
        end_forward: Callable[[Exception | None], Exception | None],
    ) -> None:
        """`end_forward` is told where the forward has ended, and tells what to raise."""
        self._forward, self._halves, self._out_channels, self._branch = forward, halves, out_channels, branch
        self._end_forward = end_forward

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def compute() -> Tensor:
            try:
                out: Tensor = self._forward(hidden_states, *args, return_dict=False, **kwargs)[0]
            except Exception as error:
                raised = self._end_forward(error)
                if raised is None or raised is error:
                    raise
                raise raised from error
            raised = self._end_forward(None)
            if raised is not None:
                raise raised
            return out

        out = self._halves.branch(self._branch(), compute, hidden_states, self._out_channels)
        if return_dict:
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=out)
        return (out,)
