"""Finding a kernel by name, and choosing one for a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from sp_sparse.kernels.base import Kernel
from sp_sparse.plugins import Plugins

logger = logging.getLogger(__name__)

KERNELS = Plugins(
    "sparse attention backend",
    "sp_sparse.kernels",
    {
        "fa4": "sp_sparse.kernels.fa4:FA4Kernel",
        "triton": "sp_sparse.kernels.triton:TritonKernel",
        "flashinfer": "sp_sparse.kernels.flashinfer:FlashInferKernel",
        "reference": "sp_sparse.kernels.reference:ReferenceKernel",
    },
    other_names=("auto", "none"),
    methods=("missing", "__call__"),
)

# `auto` takes the first of these that runs: fastest first, as measured in docs/benchmarks.
AUTO_ORDER = ("fa4", "triton", "flashinfer", "reference")


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel is wanted for.

    Attributes:
        device: where query, key and value are.
        dtype: their dtype.
        head_dim: their head dimension.
        block_size: (query block, key block) in tokens.
        needs_lse: partial results are merged by LSE, as under ring parallelism and where a remainder is added.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: tuple[int, int]
    needs_lse: bool


def load_kernel(name: str) -> Kernel:
    """The kernel called `name`: built in, an entry point of `sp_sparse.kernels`, or a class path `package.module:Class`.

    Raises:
        ValueError: nothing has this name, or a class that cannot be imported.
    """
    kernel: Kernel = KERNELS.load(name)()
    return kernel


def why_not(kernel: Kernel, request: KernelRequest) -> str | None:
    """Why `kernel` cannot serve `request`, both sides named, or None if it can."""
    info = kernel.info
    checks = (
        ("device", request.device.type, info.device_types),
        ("dtype", request.dtype, info.dtypes),
        ("head dimension", request.head_dim, info.head_dims),
        ("block size", request.block_size, info.block_sizes),
    )
    for what, wanted, able in checks:
        if able and wanted not in able:
            return f"{what} {wanted} is not among {', '.join(map(str, able))}"
    if request.needs_lse and not info.returns_lse:
        return "it returns no LSE, by which the hops of a ring and the remainder are merged"
    # Whether its package is there comes after what no installation can change, and before what asks the GPU.
    reason = kernel.missing()
    if reason is None and request.device.type == "cuda":
        reason = _wrong_capability(kernel, torch.cuda.get_device_capability(request.device), request.block_size)
    return reason


def auto_reasons(request: KernelRequest) -> dict[str, str | None]:
    """For each kernel that `auto` may take, why it cannot run here, or None. A kernel that cannot be loaded cannot run."""
    reasons: dict[str, str | None] = {}
    for name in AUTO_ORDER:
        try:
            reasons[name] = why_not(load_kernel(name), request)
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def select_kernel(
    name: str,
    request: KernelRequest,
    log: bool = True,
    reasons: Mapping[int, Mapping[str, str | None]] | None = None,
) -> Kernel:
    """The kernel for `request`: the one called `name`, or for `auto` the fastest that runs.

    Args:
        name: of the kernel, or `auto`.
        request: what it is wanted for.
        log: tell what `auto` took, and why not those before it.
        reasons: `auto_reasons` of every rank, by rank, so that all take the same; by default those of this process.

    Raises:
        ValueError: the named kernel cannot serve the request; the text says why and names those that can.
    """
    if name != "auto":
        kernel = load_kernel(name)
        reason = why_not(kernel, request)
        if reason is not None:
            raise ValueError(f"sparse attention backend {name!r} cannot run here: {reason}; {_remedy(request)}")
        return kernel
    if reasons is None:
        reasons = {0: auto_reasons(request)}
    passed_over: list[tuple[str, str]] = []
    for candidate in AUTO_ORDER:
        against = [(rank, why[candidate]) for rank, why in reasons.items() if why[candidate] is not None]
        if not against:
            if log:
                others = "".join(f"; not {other}: {why}" for other, why in passed_over)
                logger.info("sparse attention backend auto: %s on %s%s", candidate, request.device, others)
            return load_kernel(candidate)
        rank, reason = against[0]
        passed_over.append((candidate, f"rank {rank}: {reason}" if len(reasons) > 1 else str(reason)))
    raise ValueError("no sparse attention backend can run here: " + "; ".join(f"{n}: {why}" for n, why in passed_over))


def check_returns_lse(name: str, need: str, without: str) -> None:
    """Refuse, before any tensor is seen, a kernel whose results cannot be merged.

    Args:
        name: of the kernel, or `auto`.
        need: what needs the LSE, and for what.
        without: the setting that does without.

    Raises:
        ValueError: the kernel returns no LSE; the text names those that do.
    """
    if name == "auto" or load_kernel(name).info.returns_lse:
        return
    able = [other for other, kernel in _loadable().items() if kernel.info.returns_lse]
    raise ValueError(
        f"sparse attention backend {name!r} returns no LSE, which {need}; use {', '.join(able)}, or {without}"
    )


def _wrong_capability(kernel: Kernel, capability: tuple[int, int], block_size: tuple[int, int]) -> str | None:
    info = kernel.info
    if capability < info.min_capability or (info.max_capability is not None and capability > info.max_capability):
        upper = "newer" if info.max_capability is None else "{}.{}".format(*info.max_capability)
        return "compute capability {}.{} is outside {}.{} to {}".format(*capability, *info.min_capability, upper)
    taken = [sizes for first, sizes in info.newer_block_sizes if capability >= first]
    if taken and block_size not in taken[-1]:
        sizes = ", ".join(map(str, taken[-1]))
        return "block size {} is not among {} on compute capability {}.{}".format(block_size, sizes, *capability)
    return None


def _remedy(request: KernelRequest) -> str:
    able = [name for name, kernel in _loadable().items() if why_not(kernel, request) is None]
    return f"use {', '.join(('auto', *able))}" if able else "no installed backend can"


def _loadable() -> dict[str, Kernel]:
    """The kernels that a remedy may name: one that cannot be loaded must not hide the error that is being told."""
    kernels = {}
    for name in KERNELS.names():
        with suppress(ValueError):
            kernels[name] = load_kernel(name)
    return kernels
