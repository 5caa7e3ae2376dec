"""From arguments to a pipeline whose attention is sparse and sequence-parallel."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.attention import load_names
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.auto_mesh import crossing_group
from sp_sparse.generate.models import transformers_of
from sp_sparse.generate.ranks import Ranks
from sp_sparse.integrations.diffusers import SparseWan, enable_sparse_attention
from sp_sparse.integrations.diffusers.sharded import blocks_of


def check_ranks(arguments: GenerateArguments, ranks: Ranks) -> None:
    """Refuse degrees that do not fit the ranks, and attention that cannot run on them; tell of slow meshes.

    Raises:
        ValueError: with the numbers and the remedy.
    """
    shape = f"ulysses {arguments.ulysses_degree} x ring {arguments.ring_degree} x cfg {arguments.cfg_parallel_degree}"
    if arguments.ranks_wanted != ranks.world:
        raise ValueError(
            f"{shape} = {arguments.ranks_wanted} ranks are asked for, but {ranks.world} run; start "
            f"{_torchrun(arguments.ranks_wanted, ranks)}, or choose degrees whose product is {ranks.world}"
            f"{_fitting_degrees(ranks)}"
        )
    if arguments.sparse.backend == "none" and ranks.world > 1 and ranks.device.type == "cpu":
        raise ValueError(
            f"--sparse-attn-backend none on {ranks.world} ranks uses diffusers' own parallelism, which needs GPUs; for "
            "dense sequence parallelism on CPUs use --sparse-attn-backend auto --sparse-attn-topk 1.0"
        )
    check_names(arguments.sparse, arguments.ring_degree)
    crossing = crossing_group(arguments.ulysses_degree, ranks.nodes)
    if crossing is not None and arguments.mesh_reason is None:  # else --mesh auto has told why
        ranks.say(
            f"--ulysses-degree {arguments.ulysses_degree} crosses nodes: {ranks.name(crossing[0])} exchanges heads with "
            f"{ranks.name(crossing[-1])}, which is slower than within one; with a degree that divides the ranks of every "
            f"node ({', '.join(str(count) for count in _ranks_of_nodes(ranks))}) and a ring across, it would not"
        )


def _ranks_of_nodes(ranks: Ranks) -> list[int]:
    return list(Counter(ranks.nodes).values())


def _torchrun(wanted: int, ranks: Ranks) -> str:
    nodes = len(_ranks_of_nodes(ranks))
    return f"{wanted} ranks on {nodes} nodes" if nodes > 1 else f"`torchrun --nproc-per-node {wanted}`"


def _fitting_degrees(ranks: Ranks) -> str:
    """An example for several nodes with equally many ranks: Ulysses within a node, ring across."""
    counts = _ranks_of_nodes(ranks)
    if len(counts) < 2 or len(set(counts)) > 1:
        return ""
    return f", such as --ulysses-degree {counts[0]} --ring-degree {len(counts)} for {len(counts)} nodes of {counts[0]}"


def check_names(config: SparseAttentionConfig, ring_degree: int) -> None:
    """Refuse names that stand for nothing here, and a kernel whose results cannot be merged, before weights are read.

    Raises:
        ValueError: with the names that are known.
    """
    if config.backend != "none":
        load_names(config, ring_degree)


def build_mesh(arguments: GenerateArguments) -> SequenceParallelMesh:
    """The process groups of the degrees that were asked for. A collective call."""
    return SequenceParallelMesh(
        arguments.ulysses_degree,
        arguments.ring_degree,
        arguments.cfg_parallel_degree,
        timeout=timedelta(seconds=arguments.timeout_s),
    )


def attach(
    pipe: Any, config: SparseAttentionConfig, mesh: SequenceParallelMesh, recorder: AttentionRecorder
) -> SparseWan:
    """Make the attention of `pipe` sparse, with a kernel that runs here or an error now. A collective call."""
    handle = enable_sparse_attention(pipe, config, mesh, recorder)
    for layer in handle.layers:
        layer.kernel_for(pipe.device, pipe.transformer.blocks[0].attn1.to_q.weight.dtype)
    return handle


def prepare_transformers(pipe: Any, arguments: GenerateArguments, mesh: SequenceParallelMesh) -> None:
    """What is done once a pipeline: diffusers' own parallelism where ours is off, and compilation."""
    for transformer in transformers_of(pipe):
        if arguments.sparse.backend == "none" and mesh.sequence_degree > 1:
            _enable_diffusers_parallelism(transformer, mesh)
        if arguments.compile and arguments.offload != "layers":  # there it is done, within the hooks
            # As compile_repeated_blocks() does, which does not know the classes that FSDP2 gives to blocks.
            for block in blocks_of(transformer):
                block.compile()


def _enable_diffusers_parallelism(transformer: Any, mesh: SequenceParallelMesh) -> None:
    from diffusers import ContextParallelConfig

    if mesh.ring_degree > 1:
        transformer.set_attention_backend("_native_cudnn")  # the default one returns no LSE, which its ring needs
    config = ContextParallelConfig(ulysses_degree=mesh.ulysses_degree, ring_degree=mesh.ring_degree)
    transformer.enable_parallelism(config=config)
