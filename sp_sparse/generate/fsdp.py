"""`--fsdp`: weights dealt out over all ranks by torch's FSDP2; each block is gathered while the one before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.integrations.diffusers.sharded import settle


def check_fsdp(arguments: GenerateArguments) -> None:
    """Refuse what weights that are dealt out do not go with.

    Raises:
        ValueError: one rank, diffusers' own parallelism, or a torch without what this needs.
    """
    if arguments.ranks_wanted == 1:
        raise ValueError(
            "--fsdp deals the weights out over the ranks of a job, and there is one; start several, such as `torchrun "
            "--nproc-per-node 2` with --ulysses-degree 2, or leave --fsdp out"
        )
    if arguments.sparse.backend == "none":
        raise ValueError(
            "--fsdp goes with sp_sparse's own parallelism, which --sparse-attn-backend none leaves off; use "
            "--sparse-attn-backend auto, with --sparse-attn-topk 1.0 for dense attention, or leave --fsdp out"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise ValueError(f"--fsdp needs torch 2.7 or newer, and this is {torch.__version__}; update it")


def world_mesh(device: torch.device) -> Any:
    """All ranks of the job, those of both guidance halves."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    group = dist.group.WORLD
    assert group is not None  # there are several ranks
    return DeviceMesh.from_group(group, device.type)


def shard_block(block: nn.Module, mesh: Any) -> None:
    """Deal out one block, which is moved to this rank's device and of which this rank keeps its part."""
    from torch.distributed.fsdp import fully_shard

    block.requires_grad_(False)  # weights of a gradient would have to be of one dtype
    fully_shard(block, mesh=mesh, reshard_after_forward=True)


def shard_model(model: Any, blocks: Sequence[Any], mesh: Any, whole: bool) -> None:
    """Make one of a model whose `blocks` are dealt out, in the order in which they run.

    Args:
        whole: whether every rank keeps the model's other weights whole. It must where ranks do not run the same forwards:
            of guidance on two halves each half skips one, but for what stands around the blocks.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    dealt = {id(weight) for block in blocks for weight in block.parameters()}
    others = {weight for weight in model.parameters() if id(weight) not in dealt}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=others if whole else None)
    for block, following in zip(blocks[:-1], blocks[1:], strict=True):
        block.set_modules_to_forward_prefetch([following])
    model.register_forward_hook(lambda *_: settle(model, blocks))
