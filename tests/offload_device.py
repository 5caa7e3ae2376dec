"""A pretended device for tests of offloading on a CPU: weights that wait are of no use, and their moves are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers.hooks import group_offloading
from torch import Tensor

from sp_sparse.generate import offload


def _spoilt(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.zeros_like(tensor)


class _Stream:
    """Of a device that copies at once."""

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Backend:
    """`TorchDeviceBackend` of a device with streams."""

    def __init__(self, device: Any) -> None: ...

    Stream = current_stream = staticmethod(_Stream)

    def stream(self, stream: _Stream) -> _Stream:
        return stream


@contextmanager
def pretended_device(before_coming: Callable[[str], None] = lambda name: None) -> Iterator[Counter[str]]:
    """Within it, the CPU is also a device with streams; forked ranks inherit it.

    Args:
        before_coming: called before a part comes (its name), or a block (`block`); may raise.

    Yields:
        How often each part has come (`transformer`), or a block has (`block`).
    """
    came: Counter[str] = Counter()
    come, to_device = offload._Part.come, group_offloading.ModuleGroup._onload_from_memory
    to_cpu = group_offloading.ModuleGroup._offload_to_memory

    def counted(part: Any) -> None:
        before_coming(part.name)
        came[part.name] += 1
        come(part)

    def spoil(part: Any) -> None:
        for leaf, home in zip(part._leaves, part._homes, strict=True):
            leaf.data = _spoilt(home)

    def of_group(group: Any) -> list[Tensor]:
        inner = [x for module in group.modules for x in (*module.parameters(), *module.buffers())]
        return [*inner, *group.parameters, *group.buffers]

    def group_comes(group: Any) -> None:
        if group.stream is None:
            assert not of_group(group), "diffusers copies what is no block both ways, and not page-locked"
        elif group not in there:  # on a CPU, diffusers takes a block for one that waits and brings it again
            before_coming("block")
            came["block"] += 1
            there.add(group)
        to_device(group)

    def group_goes(group: Any) -> None:
        to_cpu(group)
        there.discard(group)
        for tensor in of_group(group):
            tensor.data = _spoilt(tensor)

    def with_streams(module: Any, *, offload_type: str, use_stream: bool, **how: Any) -> None:
        assert not use_stream, "there is no GPU"
        config = group_offloading.GroupOffloadingConfig(
            offload_type=group_offloading.GroupOffloadingType(offload_type),
            non_blocking=False,
            stream=_Stream(),  # type: ignore[arg-type]
            record_stream=False,
            low_cpu_mem_usage=False,
            **how,
        )
        group_offloading._apply_group_offloading(module, config)

    there: set[Any] = set()
    with ExitStack() as stack:
        for target, name, replacement in (
            (offload._Part, "come", counted),
            (offload._Part, "leave", spoil),
            (group_offloading.ModuleGroup, "_onload_from_memory", group_comes),
            (group_offloading.ModuleGroup, "_offload_to_memory", group_goes),
            (group_offloading, "TorchDeviceBackend", _Backend),
            (torch.Tensor, "pin_memory", lambda tensor: tensor.clone()),
            (torch.Tensor, "is_pinned", lambda tensor: True),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        stack.enter_context(mock.patch("diffusers.hooks.apply_group_offloading", with_streams))
        yield came
