"""Ranks cannot disagree at construction: one that cannot load its part makes all raise, and `auto` takes one for all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sp_sparse import BlockMask, SequenceParallelMesh, SequenceShards, SparseAttention, SparseAttentionConfig
from sp_sparse.kernels import dense, registry
from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.selection.topk import TopKSelector
from tests.ranks import run_ranks, world_group

GRID = (3, 5, 7)
SECONDS = 30.0


class FastKernel(ReferenceKernel):
    """What `auto` prefers, and what rank 1 lacks."""

    info = KernelInfo(name="fast")

    def missing(self) -> str | None:
        return "libcudart.so.13 cannot be opened" if dist.is_initialized() and dist.get_rank() == 1 else None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("not every rank has it")


class BrokenOnOneRank(ReferenceKernel):
    """Rank 1 fails while it is made."""

    info = KernelInfo(name="broken")

    def __init__(self) -> None:
        if dist.get_rank() == 1:
            raise OSError("libcudart.so.13: cannot open shared object file")


class SelectorOnOneRank(TopKSelector):
    """Rank 0 alone fails."""

    def __init__(self, config: SparseAttentionConfig) -> None:
        if dist.get_rank() == 0:
            raise RuntimeError("no table for this selector")


def _layer(mesh: SequenceParallelMesh, **more: object) -> SparseAttention:
    options = {"backend": "reference", "topk": 0.4, "schedule": "constant", "block_size": (8, 8), **more}
    return SparseAttention(SparseAttentionConfig.from_mapping(options), mesh, num_heads=4, head_dim=8)


def _call(layer: SparseAttention) -> Tensor:
    first, last = layer.shards(GRID).range_of(layer.mesh.sequence_rank)
    x = torch.randn(1, 105, 4, 8, generator=torch.Generator().manual_seed(0))[:, first:last]
    return layer(x, x, x, grid=GRID)


def _refused(action: Callable[[], object], own: type[Exception], text: str, rank: int, failing: int) -> None:
    """On the failing rank its own error, on the others its words, everywhere within seconds."""
    start = time.monotonic()
    with pytest.raises(own if rank == failing else RuntimeError, match=text) as caught:
        action()
    assert rank == failing or f"rank {failing}: {own.__name__}" in str(caught.value)
    assert rank == failing or str(caught.value).endswith("mend it there, or choose what all ranks have")
    assert time.monotonic() - start < SECONDS
    dist.barrier()  # no rank is left behind in a collective


def _check_construction(rank: int, ulysses: int, ring: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring)
    name = "tests.test_ranks_agree"
    _refused(lambda: _layer(mesh, backend=f"{name}:BrokenOnOneRank"), OSError, "libcudart.so.13", rank, 1)
    _refused(lambda: _layer(mesh, selector=f"{name}:SelectorOnOneRank"), RuntimeError, "no table for", rank, 0)
    backend = f"{name}:FastKernel"  # loads everywhere, runs not on rank 1
    _refused(lambda: _call(_layer(mesh, backend=backend)), ValueError, "libcudart.so.13 cannot be opened", rank, 1)
    _call(_layer(mesh))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 3), (2, 2)])
def test_what_one_rank_cannot_load_is_told_by_all(ulysses: int, ring: int) -> None:
    run_ranks(ulysses * ring, _check_construction, ulysses, ring)


def _check_auto(rank: int) -> None:
    kernels = {"fast": "tests.test_ranks_agree:FastKernel", "reference": registry.KERNELS.built_in["reference"]}
    plugins = registry.Plugins(registry.KERNELS.kind, registry.KERNELS.group, kernels)
    with mock.patch.object(registry, "KERNELS", plugins), mock.patch.object(registry, "AUTO_ORDER", tuple(kernels)):
        for mesh in (SequenceParallelMesh(3, 1), SequenceParallelMesh(1, 3)):
            layer = _layer(mesh, backend="auto")
            assert layer.kernel_for(torch.device("cpu"), torch.float32).info.name == "reference"
            _call(layer)
        alone = _layer(SequenceParallelMesh(), backend="auto").kernel_for(torch.device("cpu"), torch.float32)
        assert alone.info.name == ("reference" if rank == 1 else "fast")


def test_auto_takes_one_kernel_for_all_ranks() -> None:
    run_ranks(3, _check_auto)


def _check_gathered(rank: int) -> None:
    mesh = SequenceParallelMesh(1, 2)
    config = SparseAttentionConfig(backend="reference", schedule="constant", block_size=(8, 8))
    with pytest.raises(RuntimeError, match="ranks differ in sparse attention settings"):
        SparseAttention(config, mesh, num_heads=4, head_dim=8, all_gather_kv=rank == 1)


def test_ranks_that_bring_other_keys_are_refused() -> None:
    run_ranks(2, _check_gathered)


def _check_groups(rank: int) -> None:
    group = world_group()
    for name in ("ulysses", "ring"):
        text = f"{name}_degree=1 was given a group of 2 ranks; pass a group of 1 ranks, or {name}_degree=2"
        with pytest.raises(ValueError, match=text):
            SequenceParallelMesh(**{f"{name}_group": group})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name}_degree=3 was given a group of 2 ranks"):
            SequenceParallelMesh(**{f"{name}_group": group, f"{name}_degree": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cfg_degree=1 was given a group of 2 ranks"):
        SequenceParallelMesh(ulysses_degree=2, ulysses_group=group, cfg_group=group)
    _call(_layer(SequenceParallelMesh(ring_group=group, ring_degree=2)))


def test_a_group_without_its_degree_is_refused() -> None:
    run_ranks(2, _check_groups)


def _check_missing_private_function(rank: int) -> None:
    with (
        mock.patch("sp_sparse.parallel.mesh.distributed_c10d", object()),
        pytest.raises(RuntimeError, match=r"has no distributed_c10d\._set_pg_timeout.*leave timeout=None"),
    ):
        SequenceParallelMesh(2, 1, timeout=timedelta(seconds=20))


def test_a_private_function_that_is_gone_is_named() -> None:
    run_ranks(2, _check_missing_private_function)


def test_layers_share_what_is_alike() -> None:
    mesh = SequenceParallelMesh()
    config = SparseAttentionConfig(backend="reference", schedule="constant", block_size=(8, 8))
    first = SparseAttention(config, mesh, num_heads=4, head_dim=8)
    second = SparseAttention(config, mesh, num_heads=4, head_dim=8, layer=1, like=first)
    _call(first)
    _call(second)
    assert second._kernels is first._kernels
    assert second._static_plans is first._static_plans
    for other in (SequenceParallelMesh(), mesh):
        with pytest.raises(ValueError, match="like= names a layer of another"):
            SparseAttention(config, other, num_heads=4, head_dim=8 if other is not mesh else 16, like=first)


def test_a_private_operator_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"has no torch\.ops\.aten\._gone, by which dense.*docs/compatibility\.md"):
        dense._private("_gone")
    assert callable(dense._private("_scaled_dot_product_flash_attention"))


def test_ring_ranks_without_tokens_are_told() -> None:
    mesh = SequenceParallelMesh()
    object.__setattr__(mesh, "ring_degree", 3)
    layer = _layer(mesh, block_size=(24, 32))
    text = "1 of 3 ring ranks have no tokens: 105 tokens are cut at multiples of 96, .* 24x32 need.*ring_degree=2"
    with pytest.warns(UserWarning, match=text):
        layer.shards(GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _layer(mesh, block_size=(16, 32)).shards(GRID)


def _check_first_call(rank: int) -> None:
    """NCCL wants every rank of a group in the group's first call, which point-to-point messages at shard edges are not."""
    calls: list[str] = []
    gather, batch = dist.all_gather_object, dist.batch_isend_irecv

    def gathering(*arguments: object, **options: object) -> None:
        calls.append("all ranks")
        gather(*arguments, **options)

    def batching(operations: list[dist.P2POp]) -> list[dist.Work]:
        calls.append("some ranks")
        return batch(operations)

    with (
        mock.patch.object(dist, "all_gather_object", gathering),
        mock.patch.object(dist, "batch_isend_irecv", batching),
    ):
        mesh = SequenceParallelMesh(ring_degree=3, ring_group=dist.new_group())
        layer = _layer(mesh, kv_exchange="all_gather")
        shards = SequenceShards.equal(105, 3)
        x = torch.randn(1, shards.lengths[rank], 4, 8)
        layer(x, x, x, grid=GRID, shards=shards)
    assert calls[0] == "all ranks"
    assert "some ranks" in calls


def test_a_groups_first_call_is_one_of_all_its_ranks() -> None:
    run_ranks(3, _check_first_call)
