"""What the ranks of a mesh agree on at each forward of a Wan transformer, and at each step of its pipeline's scheduler.

Settings are compared: ranks that differ all raise. Inputs are made the first rank's, so that noise or embeddings drawn
without a common seed cannot part the ranks. A transformer without its pipeline cannot do that for the latents that its loop
keeps: there ranks that differ in them raise, too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sp_sparse.parallel.agreement import RefusedError, check_call, every_value
from sp_sparse.parallel.collectives import all_from_first, from_first
from sp_sparse.parallel.failures import Standing
from sp_sparse.parallel.mesh import SequenceParallelMesh

# The first inputs of a forward, which are new at each step.
_STEPPED = 2
_ROUNDING = 0.05
_REMEDY = "run the same loop with the same arguments on every rank"


class ForwardAgreement:
    """Called by every rank at the start of each forward. A collective call on meshes of several ranks.

    With `cfg_degree=2` the second branch is agreed on within each half alone: there the first half waits for nothing, and
    the second must not wait until the first has finished its own branch.

    A forward costs one small exchange a group, on the host where the groups meet there, and one broadcast a group of the
    inputs that are new. Nothing waits for the device then.
    """

    def __init__(self, mesh: SequenceParallelMesh, inputs: Sequence[str], keeps_latents: bool) -> None:
        """
        Args:
            inputs: names of the tensors that a forward takes, in the order of its parameters: latents, timestep, others.
            keeps_latents: nobody makes the latents of the loop alike, so ranks that differ in them must be refused.
        """
        self._mesh, self._names, self._keeps_latents = mesh, tuple(inputs), keeps_latents
        self._halves = mesh.sequence_groups
        self._kept: dict[str, tuple[_Agreed, ...]] = {}
        self._latents: _Latents | None = None

    def __call__(
        self, settings: Mapping[str, object], branch: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Compare `settings`, and give back the arguments of the forward with the first rank's tensors.

        Raises:
            RefusedError: the settings, or shapes or dtypes of the inputs, differ; on every rank.
        """
        self._latents = None
        if not self._mesh.groups:
            return args, dict(kwargs)
        second = branch == "uncond" and self._mesh.cfg_degree > 1
        groups = self._halves if second else self._mesh.groups
        inputs = {**dict(zip(self._names, args, strict=False)), **{n: kwargs[n] for n in self._names if n in kwargs}}
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
        found = {name: self._find(name, x, second) for name, x in tensors.items()}
        new = check_call(
            {
                "guidance branch": branch,
                **settings,
                **shapes,
                "attention_kwargs": plain(kwargs.get("attention_kwargs")),
            },
            groups,
            tensors["hidden_states"].device,
            _REMEDY,
            [found.get(name) is None for name in self._names],
        )
        sent = {name for name, is_new in zip(self._names, new, strict=True) if is_new and name in tensors}
        agreed = {name: kept.value for name, kept in found.items() if kept is not None}
        # Texts are sent once a loop, so they do not keep the latents' buffer.
        for names in (self._names[:_STEPPED], self._names[_STEPPED:]):
            these = [name for name in names if name in sent]
            for name, x in zip(these, all_from_first([tensors[name] for name in these], groups), strict=True):
                agreed[name] = x
                self._keep(name, tensors[name], x, not second)
        if self._keeps_latents and "hidden_states" in sent:
            self._latents = _Latents(tensors["hidden_states"], agreed["hidden_states"], groups)
        replaced = tuple(agreed.get(name, x) for name, x in zip(self._names, args, strict=False))
        return (*replaced, *args[len(self._names) :]), {name: agreed.get(name, x) for name, x in kwargs.items()}

    def confirm(self) -> None:
        """Called by every rank where the host has given the device all of the forward, so that waiting costs nothing.

        Raises:
            RefusedError: latents that the loop keeps differ; on every rank.
        """
        latents, self._latents = self._latents, None
        if latents is not None:
            latents.check()

    def _find(self, name: str, x: Tensor, second: bool) -> _Agreed | None:
        """What the ranks have agreed on for this very tensor: texts are the same at each step, latents in both branches."""
        every = self._kept.get(name, ())
        found = next((kept for kept in every if kept.is_for(x) and (kept.by_all or second)), None)
        if found is not None:  # to the front, so that what is new at each step takes the other place
            self._kept[name] = (found, *(kept for kept in every if kept is not found))
        return found

    def _keep(self, name: str, own: Tensor, value: Tensor, by_all: bool) -> None:
        if own.is_inference() or value.is_inference():  # nobody counts their changes
            return
        # A text for each branch; latents and timesteps are new at each step.
        older = () if name in self._names[:_STEPPED] else self._kept.get(name, ())[:1]
        self._kept[name] = (_Agreed(weakref.ref(own), own._version, value, value._version, by_all), *older)


@dataclass(frozen=True)
class _Agreed:
    """What all ranks use instead of one's own tensor, while nobody writes into either."""

    own: weakref.ref[Tensor]
    own_version: int
    value: Tensor
    version: int
    by_all: bool

    def is_for(self, x: Tensor) -> bool:
        return self.own() is x and (x._version, self.value._version) == (self.own_version, self.version)


class _Latents:
    """Noise that was drawn apart is refused; encoders that round otherwise on another GPU are no reason to."""

    def __init__(self, own: Tensor, first: Tensor, groups: Sequence[ProcessGroup]) -> None:
        self._groups = groups
        self._own = torch.stack([x.float().norm() for x in (own - first, first)])
        worst = self._own.clone()
        for group in groups:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
        self._worst = torch.empty(2, device="cpu", pin_memory=own.is_cuda)
        self._worst.copy_(worst, non_blocking=own.is_cuda)
        self._copied = torch.cuda.Event() if own.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def check(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        apart, size = self._worst.tolist()
        if not apart > _ROUNDING * size:  # NaN is another matter
            return
        every = every_value(f"{self._own[0].item() / max(size, 1e-30):.0%}", self._groups)
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

    def __init__(self, pipeline: Any, groups: Sequence[ProcessGroup], standing: Standing) -> None:
        self._pipeline, self._groups, self._standing = pipeline, groups, standing
        self._release: Callable[[], Any] = _nothing

    def watch(self) -> None:
        scheduler = self._pipeline.scheduler
        if not self._groups or isinstance(scheduler.__dict__.get("step"), _FirstRanksStep):
            return
        self.release()
        step = _FirstRanksStep(scheduler.step, self._groups, self._standing)
        self._release = functools.partial(_take_back, scheduler, step, scheduler.__dict__.get("step"))
        scheduler.__dict__["step"] = step

    def release(self) -> None:
        """Give the scheduler its own step back."""
        release, self._release = self._release, _nothing
        release()


class _FirstRanksStep:
    """`scheduler.step` whose sample is the first rank's."""

    def __init__(self, step: Callable[..., Any], groups: Sequence[ProcessGroup], standing: Standing) -> None:
        functools.update_wrapper(self, step)  # pipelines look at its parameters
        self._step, self._groups, self._standing = step, groups, standing

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._step(*args, **kwargs)
        with self._standing.watch("the ranks did not all end a denoising step"):
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
