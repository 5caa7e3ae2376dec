"""Weights that wait in the CPU's memory for their turn: whole parts of a pipeline, or the blocks of its models.

`idle`: of text encoder, image encoder, first and second expert one at most is on the device, and between them none. A part
comes with its forward, by which the one before it goes: within a video of two experts that is once, at the boundary
between them. It goes by dropping what is on the device, since the CPU's memory has kept it.

`layers`: group offloading of diffusers. A block comes while the one before it computes, and goes when it has. What is beside
the blocks takes turns as parts do: diffusers would copy it both ways, unpinned, at every forward. So does the image
encoder, which is small and runs once a video.

Which part computes is the pipeline's to say, alike on all ranks, so these move the same at the same step and exchange
nothing. Parts come within the forward, where the others hear of a rank that fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.integrations.diffusers.sharded import blocks_of

_TRANSFORMERS = ("transformer", "transformer_2")
_IMAGE_ENCODER = "image_encoder"
_PARTS = ("text_encoder", _IMAGE_ENCODER, *_TRANSFORMERS)

# torch rounds page-locked memory up to a power of two, by which a Wan transformer would take half as much again.
_CHUNK_BYTES = 1 << 30
_ALIGNMENT = 256


def offload(pipe: Any, arguments: GenerateArguments, device: torch.device) -> None:
    """Place a pipeline that was loaded on the CPU as `--offload idle` or `layers` says; the VAE goes to `device`.

    LoRA weights are in it already: what is added later would not move.

    Raises:
        RuntimeError: what waits finds no room in the CPU's memory.
    """
    parts = _parts(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and name not in parts:
            module.to(device)
    turns = _Turns()
    for name, module in parts.items():
        by_blocks = arguments.offload == "layers" and name != _IMAGE_ENCODER
        # By way of the device, so that quantised weights name it as theirs: only what they consist of moves from here on.
        leaves = _leaves_beside(module, _blocks_of(name, module)) if by_blocks else _leaves(module.to(device))
        # Before diffusers' hooks, which are outermost where they count themselves so.
        add_hook_to_module(module, _Part(name, leaves, device, turns))
        if by_blocks:
            _offload_blocks(name, module, device, arguments.compile)


def send_home(pipe: Any) -> None:
    """Let the part that is on the device wait too; nothing happens where parts do not take turns."""
    turns = _turns_of(pipe)
    if turns is not None:
        turns.end()


def comings(pipe: Any) -> dict[str, int] | None:
    """How often each part has come to the device; None where parts do not take turns."""
    turns = _turns_of(pipe)
    return None if turns is None else dict(turns.comings)


def _parts(pipe: Any) -> dict[str, Any]:
    found = {name: getattr(pipe, name, None) for name in _PARTS}
    return {name: module for name, module in found.items() if module is not None}


def _turns_of(pipe: Any) -> _Turns | None:
    hooks = (getattr(module, "_hf_hook", None) for module in _parts(pipe).values())
    return next((hook.turns for hook in hooks if isinstance(hook, _Part)), None)


class _Turns:
    """Whose turn it is to be on the device."""

    def __init__(self) -> None:
        self.comings: Counter[str] = Counter()
        self._at_work: _Part | None = None

    def take(self, part: _Part) -> None:
        if self._at_work is part:
            return
        self.end()
        part.come()
        self._at_work = part
        self.comings[part.name] += 1

    def end(self) -> None:
        if self._at_work is not None:
            self._at_work.leave()
            self._at_work = None


class _Part(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """A part of a pipeline, whose weights come to the device with its forward.

    Attributes:
        name: in the pipeline.
        turns: of all parts.
        execution_device: where its inputs belong, also while it waits; diffusers asks for it by this name.
    """

    def __init__(self, name: str, leaves: Iterable[Tensor], device: torch.device, turns: _Turns) -> None:
        super().__init__()
        self.name, self.turns, self.execution_device = name, turns, device
        self._leaves = list(leaves)
        self._homes = _copies(self._leaves, pinned=device.type == "cuda")
        self.leave()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.turns.take(self)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.name == _IMAGE_ENCODER:
            self.turns.end()  # the VAE encodes next, and may need the room
        return output

    def come(self) -> None:
        """To the device, or not at all. From page-locked memory the host does not wait for it."""
        try:
            for leaf, home in zip(self._leaves, self._homes, strict=True):
                leaf.data = home.to(self.execution_device, non_blocking=True)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Drop what is on the device."""
        for leaf, home in zip(self._leaves, self._homes, strict=True):
            leaf.data = home


def _leaves(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; of quantised ones the tensors that they consist of."""
    waiting: list[Tensor] = [*module.parameters(), *module.buffers()]
    while waiting:
        tensor = waiting.pop()
        if is_traceable_wrapper_subclass(tensor):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            yield tensor


def _leaves_beside(module: nn.Module, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """As `_leaves`, without those of `blocks`."""
    others = {id(tensor) for block in blocks for tensor in _leaves(block)}
    return [tensor for tensor in _leaves(module) if id(tensor) not in others]


def _blocks_of(name: str, module: Any) -> list[nn.Module]:
    return blocks_of(module) if name in _TRANSFORMERS else list(module.encoder.block)


@torch.no_grad()
def _copies(tensors: Sequence[Tensor], pinned: bool) -> list[Tensor]:
    """Copies in the CPU's memory, packed into few allocations.

    Raises:
        RuntimeError: there is no room, or not to be page-locked.
    """
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    left, copies = sum(sizes), []
    chunk = torch.empty(0, dtype=torch.uint8)
    for tensor, size in zip(tensors, sizes, strict=True):
        place = chunk
        if size > chunk.numel():
            try:
                room = max(size, min(_CHUNK_BYTES, left))
                place = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the CPU's memory has no room for {left / 1e9:.1f} GB of the weights that --offload lets wait "
                    f"there{' page-locked' * pinned}, on each rank; use fewer ranks on this machine, or --offload none"
                ) from error
        copy = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if _is_dense(tensor):
            copy = copy.as_strided(tensor.shape, tensor.stride())
        copies.append(copy.copy_(tensor))
        left -= size
        if place is chunk or place.numel() - size > chunk.numel():
            chunk = place[size:]
    return copies


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of dimensions."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(extent == prod(tensor.shape))


def _offload_blocks(name: str, module: Any, device: torch.device, compiled: bool) -> None:
    from diffusers.hooks import HookRegistry, apply_group_offloading

    if compiled and name in _TRANSFORMERS:
        for block in _blocks_of(name, module):
            # Within the hooks, which differ from block to block and would be compiled anew for each.
            block.forward = torch.compile(block.forward)
    stack = module if name in _TRANSFORMERS else module.encoder
    apply_group_offloading(
        stack,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        # Without record_stream: a host that runs ahead of the device would bring all blocks before the first is done.
        use_stream=device.type == "cuda",
    )
    hook: Any = HookRegistry.check_if_exists_or_initialize(stack).get_hook("group_offloading")
    beside = hook.group
    beside.modules, beside.parameters, beside.buffers = [], [], []  # these take turns
