"""Weights that FSDP2 has dealt out over ranks: the order of its all-gathers, and what a rank that fails owes the others.

Each block of such a model is all-gathered before it runs, on all ranks in the same order. So a rank that leaves a forward
gathers the blocks that it has not come to, lest the others wait for its part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a Wan transformer, in the order in which they run."""
    return [*getattr(model, "vace_blocks", ()), *model.blocks]


def is_sharded(block: nn.Module) -> bool:
    """Whether `fully_shard` has dealt out the weights of this block."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(block, FSDPModule)


def gather_weights(block: Any) -> None:
    """Take part in the all-gather of a block, if there is one and this rank has not. A collective call."""
    if is_sharded(block):
        block.unshard()


def free_weights(block: Any) -> None:
    """Keep this rank's part of a block alone."""
    if is_sharded(block):
        block.reshard()


def settle(model: Any, blocks: Sequence[Any]) -> None:
    """Have every block in parts, and none within a forward, of a model that has ended one; also one that has failed.

    Drops the order in which blocks ran, too: FSDP2 keeps it for a backward pass, and would add to it with every forward.
    """
    if not is_sharded(model):
        return
    for block in blocks:
        block.reshard()
    root = model._get_fsdp_state()
    if not root._is_root:  # no forward has begun yet
        return
    if hasattr(model, "reset_iter_state"):  # torch 2.13 and newer
        model.reset_iter_state()
        return
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    for block in blocks:
        block._get_fsdp_state()._fsdp_param_group._post_forward_indices.clear()
