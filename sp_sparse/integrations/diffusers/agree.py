"""What the ranks of a mesh agree on at each forward of a Wan transformer, and at each step of its pipeline's scheduler.

Settings are compared: ranks that differ all raise. Inputs are made the first rank's, so that noise or embeddings drawn
without a common seed cannot part the ranks. A transformer without its pipeline cannot do that for the latents that its loop
keeps: there ranks that differ in them raise, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.agreement import RefusedError, check_call, every_value, says_lost_rank
from sp_sparse.parallel.collectives import from_first
from sp_sparse.parallel.mesh import SequenceParallelMesh

# In the order of the parameters of WanTransformer3DModel.forward.
_INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
_ROUNDING = 0.05
_REMEDY = "run the same loop with the same arguments on every rank"


class ForwardAgreement:
    """Called by every rank at the start of each forward. A collective call on meshes of several ranks.

    With `cfg_degree=2` the second branch is agreed on within each half alone: there the first half waits for nothing, and
    the second must not wait until the first has finished its own branch.
    """

    def __init__(self, mesh: SequenceParallelMesh, keeps_latents: bool) -> None:
        """`keeps_latents`: nobody makes the latents of the loop alike, so ranks that differ in them must be refused."""
        self._mesh, self._keeps_latents = mesh, keeps_latents
        self._halves = mesh.sequence_groups
        # What the first branch was given and what it runs with: the second is given the same latents.
        self._first_branch: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, settings: Mapping[str, object], branch: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Compare `settings`, and give back the arguments of the forward with the first rank's tensors.

        Raises:
            RefusedError: the settings, or shapes or dtypes of the inputs, differ, or latents that the loop keeps; on every
                rank.
        """
        if not self._mesh.groups:
            return args, dict(kwargs)
        second, held = branch == "uncond" and self._mesh.cfg_degree > 1, self._first_branch
        self._first_branch = {}
        groups = self._halves if second else self._mesh.groups
        inputs = {**dict(zip(_INPUTS, args, strict=False)), **{n: kwargs[n] for n in _INPUTS if n in kwargs}}
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
        # Reading the result waits for the device, once a forward; 0.5 ms with the broadcasts, on two H100s.
        check_call(
            {
                "guidance branch": branch,
                **settings,
                **shapes,
                "attention_kwargs": plain(kwargs.get("attention_kwargs")),
            },
            groups,
            tensors["hidden_states"].device,
            _REMEDY,
        )
        agreed = {}
        for name, x in tensors.items():
            same = second and name in held and held[name][0] is x
            agreed[name] = held[name][1] if same else from_first(x, groups)
        if self._keeps_latents:
            _check_latents(tensors["hidden_states"], agreed["hidden_states"], groups)
        if branch == "cond" and self._mesh.cfg_degree > 1:
            self._first_branch = {name: (tensors[name], x) for name, x in agreed.items()}
        replaced = tuple(agreed.get(name, x) for name, x in zip(_INPUTS, args, strict=False))
        return (*replaced, *args[len(_INPUTS) :]), {name: agreed.get(name, x) for name, x in kwargs.items()}


def _check_latents(own: Tensor, first: Tensor, groups: Sequence[ProcessGroup]) -> None:
    """Refuse noise that was drawn apart; encoders that round otherwise on another GPU are no reason to."""
    sizes = torch.stack([x.float().norm() for x in (own - first, first)])
    worst = sizes.clone()
    for group in groups:
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    apart, size = worst.tolist()  # a second wait, only without a pipeline
    if not apart > _ROUNDING * size:  # NaN is another matter
        return
    every = every_value(f"{sizes[0].item() / max(size, 1e-30):.0%}", groups)
    told = "; ".join(f"rank {rank}: {share}" for rank, share in every.items())
    text = (
        f"ranks differ in hidden_states, relative to the first rank's ({told}), so each rank's loop would "
        "end with another video; seed the noise alike on every rank, or give "
        "enable_sparse_attention the pipeline instead of its transformer"
    )
    raise RefusedError(text, speaks=True, failure=text)


class SchedulerAgreement:
    """Makes what the scheduler of a pipeline returns the first rank's, whatever noise it draws in its steps.

    A pipeline may be given another scheduler at any time, so the one that it has is watched anew at each forward.
    """

    def __init__(self, pipeline: Any, groups: Sequence[ProcessGroup]) -> None:
        self._pipeline, self._groups = pipeline, groups
        self._release: Callable[[], Any] = _nothing

    def watch(self) -> None:
        scheduler = self._pipeline.scheduler
        if not self._groups or isinstance(scheduler.__dict__.get("step"), _FirstRanksStep):
            return
        self.release()
        step = _FirstRanksStep(scheduler.step, self._groups)
        self._release = functools.partial(_take_back, scheduler, step, scheduler.__dict__.get("step"))
        scheduler.__dict__["step"] = step

    def release(self) -> None:
        """Give the scheduler its own step back."""
        release, self._release = self._release, _nothing
        release()


class _FirstRanksStep:
    """`scheduler.step` whose sample is the first rank's."""

    def __init__(self, step: Callable[..., Any], groups: Sequence[ProcessGroup]) -> None:
        functools.update_wrapper(self, step)  # pipelines look at its parameters
        self._step, self._groups = step, groups

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._step(*args, **kwargs)
        with says_lost_rank("the ranks did not all end a denoising step"):
            if isinstance(out, tuple):
                return (from_first(out[0], self._groups), *out[1:])
            out.prev_sample = from_first(out.prev_sample, self._groups)
            return out


def _take_back(scheduler: Any, step: _FirstRanksStep, before: Any) -> None:
    if scheduler.__dict__.get("step") is not step:  # whoever stood in front has taken it away with itself
        return
    if before is None:
        del scheduler.__dict__["step"]
    else:
        scheduler.__dict__["step"] = before


def _nothing() -> None:
    pass


def plain(settings: Any) -> dict[str, object]:
    """What of an object or mapping can be compared between processes: neither tensors nor functions."""
    entries = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    return {name: x for name, x in entries.items() if isinstance(x, (int, float, str, tuple, type(None)))}
