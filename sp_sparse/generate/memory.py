"""Options that save memory: which contradict one another, and which would help where memory ran out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sp_sparse.parallel.agreement import RefusedError, is_lost_rank

LOAD, ENCODE, DENOISE, DECODE = "load", "encode", "denoise", "decode"

# Of cuBLAS, cuDNN, NCCL and other libraries: plain RuntimeErrors.
_OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class MemoryOptions:
    """The options of a job that decide what memory it takes, and what they must fit.

    Attributes:
        offload: `none`, `idle` or `layers`.
        vae_tiling: whether the VAE works in tiles.
        fsdp: whether weights are dealt out over the ranks.
        quantization: `none` or `fp8`.
        ranks: how many share the job.
        foreign_parallelism: whether tokens are shared by diffusers' own parallelism, instead of ours.

    Raises:
        ValueError: options that contradict one another.
    """

    offload: str = "none"
    vae_tiling: bool = False
    fsdp: bool = False
    quantization: str = "none"
    ranks: int = 1
    foreign_parallelism: bool = False

    def __post_init__(self) -> None:
        if self.offload == "layers" and self.foreign_parallelism:
            raise ValueError(
                "--offload layers and --sparse-attn-backend none on several ranks, which is diffusers' own parallelism, "
                "both hook into every layer; use --offload idle, or for dense attention --sparse-attn-backend auto "
                "--sparse-attn-topk 1.0"
            )
        if self.fsdp and self.offload != "none":
            raise ValueError(
                f"--fsdp keeps a part of all weights on each GPU, and --offload {self.offload} moves whole ones to it; "
                "leave out one of them"
            )

    @property
    def can_deal_out(self) -> bool:
        """Whether there are ranks to deal weights out to, by our own parallelism."""
        return self.ranks > 1 and not self.foreign_parallelism


@dataclass(frozen=True)
class _Remedy:
    """What would take less memory.

    Attributes:
        text: as the user is told it.
        stages: where it helps.
        instead_of: values of the options that it changes, for which it does; empty for what is no option.
        changes: the options that it stands for.
    """

    text: str
    stages: tuple[str, ...]
    instead_of: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def helps(self, options: MemoryOptions, stage: str) -> bool:
        """Whether it is open, and goes with the options that are given."""
        if stage not in self.stages:
            return False
        if any(getattr(options, name) not in values for name, values in self.instead_of.items()):
            return False
        try:
            replace(options, **self.changes)
        except ValueError:
            return False
        return True


_EVERYWHERE = (LOAD, ENCODE, DENOISE, DECODE)

# What costs least comes first.
_REMEDIES = (
    _Remedy("--vae-tiling", (DECODE,), {"vae_tiling": (False,)}, {"vae_tiling": True}),
    _Remedy("--offload idle", _EVERYWHERE, {"offload": ("none",)}, {"offload": "idle"}),
    _Remedy(
        "--quantization fp8 (compute capability 8.9 and newer)",
        (LOAD, DENOISE),
        {"quantization": ("none",)},
        {"quantization": "fp8"},
    ),
    _Remedy("--fsdp", (LOAD, ENCODE, DENOISE), {"fsdp": (False,), "can_deal_out": (True,)}, {"fsdp": True}),
    _Remedy("--offload layers", (LOAD, ENCODE, DENOISE), {"offload": ("none", "idle")}, {"offload": "layers"}),
    _Remedy("a higher --ulysses-degree or --ring-degree, on more GPUs", (DENOISE,)),
    _Remedy("a smaller or shorter video", (DENOISE, DECODE)),
)


def remedies(options: MemoryOptions, stage: str) -> tuple[str, ...]:
    """What would take less memory in `stage` than `options` do, what costs least first."""
    return tuple(remedy.text for remedy in _REMEDIES if remedy.helps(options, stage))


class NotEnoughMemoryError(torch.OutOfMemoryError):
    """Memory ran out in a stage of a job.

    Attributes:
        remedies: what would take less.
    """

    def __init__(self, text: str, stage: str, found: tuple[str, ...]) -> None:
        told = f"; less is taken, in this order, with {'; '.join(found)}" if found else ""
        super().__init__(f"memory ran out in {stage}{told} ({text})")
        self.remedies = found


@contextmanager
def says_what_helps(options: MemoryOptions, stage: str) -> Iterator[None]:
    """Within it, an error of memory that ran out tells which options would take less.

    Raises:
        NotEnoughMemoryError: memory ran out.
    """
    try:
        yield
    except (NotEnoughMemoryError, RefusedError):
        raise
    except Exception as error:
        if not is_out_of_memory(error) or is_lost_rank(error):  # what is told of another rank may have such words
            raise
        raise NotEnoughMemoryError(str(error), stage, remedies(options, stage)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what lacked, of the CPU or a GPU, whichever library tells it."""
    plain = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    return plain or isinstance(error, (torch.OutOfMemoryError, MemoryError))
