"""What goes wrong with meshes: told on every rank, with both sides and a remedy, and never a hang."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sp_sparse import SequenceParallelMesh, SequenceShards, SparseAttention, SparseAttentionConfig, VideoGrid
from tests.cases import random_tensors
from tests.oracle import relative_error
from tests.ranks import run_ranks, world_group

CONFIG = SparseAttentionConfig(backend="reference", schedule="constant", topk=0.4, block_size=(8, 8))
GRID = VideoGrid(3, 5, 7)
HEADS, HEAD_DIM = 5, 8


def _layer(mesh: SequenceParallelMesh, config: SparseAttentionConfig = CONFIG, **changes: Any) -> SparseAttention:
    return SparseAttention(config, mesh, **{"num_heads": HEADS, "head_dim": HEAD_DIM, **changes})


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return random_tensors(1, GRID.num_tokens, GRID.num_tokens, HEADS, HEAD_DIM, 0, torch.float32)


def _attend(mesh: SequenceParallelMesh, layer: SparseAttention | None = None) -> tuple[Tensor, Tensor]:
    """This rank's output on `mesh`, and the same tokens of the single-device output."""
    layer = layer or _layer(mesh)
    first, last = layer.shards(GRID).range_of(mesh.sequence_rank)
    tensors = _inputs()
    out = layer(*(x[:, first:last] for x in tensors), grid=GRID)
    return out, _layer(SequenceParallelMesh())(*tensors, grid=GRID)[:, first:last]


def _assert_right(mesh: SequenceParallelMesh, layer: SparseAttention | None = None) -> None:
    out, expected = _attend(mesh, layer)
    assert out.shape == expected.shape
    assert not out.numel() or relative_error(out, expected) < 2e-6


# ---------------------------------------------------------------------------------------------------------- one process


def test_no_process_group() -> None:
    with pytest.raises(
        RuntimeError, match=r"ulysses_degree=2 x ring_degree=3 needs 6 ranks .*torchrun --nproc-per-node 6"
    ):
        SequenceParallelMesh(2, 3)


@pytest.mark.parametrize("name", ["ulysses_degree", "ring_degree", "cfg_degree"])
@pytest.mark.parametrize("degree", [0, -1])
def test_degree_below_one(name: str, degree: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={degree} is below 1; use 1 to switch it off"):
        SequenceParallelMesh(**{name: degree})  # type: ignore[arg-type]


def test_guidance_has_two_branches() -> None:
    with pytest.raises(ValueError, match="cfg_degree=3: guidance has 2 branches; use 1 or 2"):
        SequenceParallelMesh(cfg_degree=3)


def test_one_rank_needs_no_process_group() -> None:
    mesh = SequenceParallelMesh()
    assert (mesh.sequence_degree, mesh.sequence_rank, mesh.groups) == (1, 0, ())
    mesh.check_same("anything", object())


def test_backend_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend 'none' means the model's own attention; choose a backend such as 'auto'"
    ):
        _layer(SequenceParallelMesh(), SparseAttentionConfig())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q, k, v: (q[..., :4], k, v), r"query has shape \(1, 105, 5, 4\), but this layer takes \[B, S, 5, 8\]"),
        (lambda q, k, v: (q[:, :, :3], k, v), r"\(1, 105, 3, 8\), but this layer takes \[B, S, 5, 8\]"),
        (lambda q, k, v: (q[0], k, v), r"query has shape \(105, 5, 8\)"),
        (lambda q, k, v: (q, k[:, :50], v), r"key is \(1, 50, 5, 8\) torch.float32 on cpu, query is \(1, 105, 5, 8\)"),
        (lambda q, k, v: (q, k, v.double()), "value is .* torch.float64 on cpu, query is .* torch.float32 on cpu"),
        (
            lambda q, k, v: (q, k.to("meta"), v),
            "key is .* on meta, query is .* on cpu; self-attention takes three alike",
        ),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "query is torch.int32; attention takes floating-point tensors"),
        (lambda q, k, v: (q[:, :99], k[:, :99], v[:, :99]), r"rank 0 holds 99 tokens but its shard of \(105,\) is 105"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[..., Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _layer(SequenceParallelMesh())(*change(*_inputs()), grid=GRID)


def test_grid_that_is_not_that_of_the_shards() -> None:
    layer = _layer(SequenceParallelMesh())
    with pytest.raises(
        ValueError, match=r"grid \(3, 5, 8\) has 120 tokens, but the shards \(105,\) .* hold 105; pass the grid"
    ):
        layer(*_inputs(), grid=(3, 5, 8), shards=SequenceShards((105,)))
    with pytest.raises(ValueError, match=r"the shards .* with 3 of padding hold 102"):
        layer(*_inputs(), grid=GRID, shards=SequenceShards((105,), padding=3))
    with pytest.raises(ValueError, match="rank 0 holds 105 tokens but its shard"):
        layer(*_inputs(), grid=(3, 5, 8))


def test_step_that_the_schedule_needs() -> None:
    layer = _layer(SequenceParallelMesh(), replace(CONFIG, schedule="aggressive"))
    with pytest.raises(ValueError, match="needs the denoising step"):
        layer(*_inputs(), grid=GRID)


def _stub_mesh(*names: str) -> DeviceMesh:
    return SimpleNamespace(mesh_dim_names=names or None)  # type: ignore[return-value]


def test_device_mesh_without_the_names() -> None:
    for mesh in (_stub_mesh("dp", "tp"), _stub_mesh()):
        with pytest.raises(ValueError, match="neither 'ulysses' nor 'ring'; name one of them so"):
            SequenceParallelMesh.from_device_mesh(mesh)


def test_device_mesh_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="'ring' must come before 'ulysses', so that"):
        SequenceParallelMesh.from_device_mesh(_stub_mesh("ulysses", "ring"))
    with pytest.raises(ValueError, match="'r' must come before 'u'"):
        SequenceParallelMesh.from_device_mesh(_stub_mesh("u", "dp", "r"), ulysses_dim="u", ring_dim="r")


# ----------------------------------------------------------------------------------------------------------- two ranks


def _check_refusals(rank: int) -> None:
    for degrees in ((2, 2), (3, 1), (1, 4), (2, 1, 2)):
        with pytest.raises(
            ValueError, match=r"but there are 2 ranks; start .* ranks, or choose degrees whose product is 2"
        ):
            SequenceParallelMesh(*degrees)
    for mine in (((2, 1), (1, 2)), ((1, 1, 2), (2, 1, 1)), ((2, 2), (1, 2)), ((2, 1), (4, 1))):
        with pytest.raises(RuntimeError, match=r"ranks differ in \(cfg_degree, ulysses_degree, ring_degree\): \{0: "):
            SequenceParallelMesh(*mine[rank])
    mesh = SequenceParallelMesh(1, 2)
    _assert_right(mesh)

    # Any argument that differs, also where one of the ranks alone would be refused.
    odd_ones: list[tuple[SparseAttentionConfig, dict[str, Any]]] = [
        (replace(CONFIG, topk=0.5), {}),
        (replace(CONFIG, token_order="tile"), {}),
        (SparseAttentionConfig(), {}),
        (replace(CONFIG, backend="unknown"), {}),
        (CONFIG, {"num_heads": 6}),
        (CONFIG, {"num_heads": 0}),
        (CONFIG, {"head_dim": 16}),
        (CONFIG, {"layer": 1}),
        (CONFIG, {"expert": 1}),
    ]
    for index, (config, changes) in enumerate(odd_ones):
        odd = rank == index % 2
        with pytest.raises(RuntimeError, match=r"ranks differ in sparse attention settings \(rank 0: .*; rank 1: .*\)"):
            _layer(mesh, config if odd else CONFIG, **(changes if odd else {}))
    _assert_right(mesh)

    ulysses = SequenceParallelMesh(2, 1)
    with pytest.raises(
        ValueError, match="1 heads cannot be split over ulysses_degree=2; use at most 1, and ring_degree"
    ):
        _layer(ulysses, num_heads=1)
    with pytest.raises(ValueError, match="ring_degree=2 was given no group; pass a group of 2 ranks"):
        SequenceParallelMesh(2, 2, ulysses_group=ulysses.ulysses_group)
    with pytest.raises(ValueError, match="ulysses_degree=3 was given a group of 2 ranks; pass a group of 3 ranks"):
        SequenceParallelMesh(3, ulysses_group=ulysses.ulysses_group)
    x = torch.zeros(1, 50 + rank, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=rf"rank {rank} holds {50 + rank} tokens but its shard of \(53, 52\)"):
        _layer(ulysses)(x, x, x, grid=GRID)
    with pytest.raises(ValueError, match="shards for 3 ranks were given to a mesh of 2"):
        _layer(ulysses)(x, x, x, grid=GRID, shards=SequenceShards((35, 35, 35)))


def test_refusals_reach_every_rank() -> None:
    run_ranks(2, _check_refusals)


def _package(folder: Path, *, init: str, module: str = "") -> None:
    package = folder / "yunchang"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(init)
    (package / "globals.py").write_text(module)


def _check_yunchang(rank: int, folder: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "yunchang"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    with pytest.raises(RuntimeError, match=r"\(OSError: no GPU here\); reinstall it, or .*from_device_mesh"):
        SequenceParallelMesh(2, 1)
    sys.modules["yunchang"] = None  # type: ignore[assignment]  # not installed
    with pytest.raises(RuntimeError, match=r"yunchang cannot be imported \(ModuleNotFoundError: .*from_device_mesh"):
        SequenceParallelMesh(1, 2)
    del sys.modules["yunchang"]
    sys.path.remove(folder)
    _assert_right(SequenceParallelMesh.from_device_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("ring",))))
    assert not any(name.split(".")[0] == "yunchang" for name in sys.modules), "the remedy does not need it"


def test_yunchang_that_cannot_be_imported(tmp_path: Path) -> None:
    _package(tmp_path, init="raise OSError('no GPU here')")
    run_ranks(2, _check_yunchang, str(tmp_path))


def _check_environment(rank: int, folder: str, before: str | None) -> None:
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    if before is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = before
    kept = dict(os.environ)
    for name in [n for n in sys.modules if n.split(".")[0] == "yunchang"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    mesh = SequenceParallelMesh(2, 1)
    assert sys.modules["yunchang"].__file__ == os.path.join(folder, "yunchang", "__init__.py")
    assert dict(os.environ) == kept
    _assert_right(mesh)


@pytest.mark.parametrize("before", [None, "8.0;9.0a"])
def test_building_groups_leaves_the_environment_alone(before: str | None, tmp_path: Path) -> None:
    """Importing yunchang on a GPU machine sets TORCH_CUDA_ARCH_LIST; this stand-in does so anywhere."""
    module = """
import torch.distributed as dist
class PROCESS_GROUP: pass
def set_seq_parallel_pg(ulysses, ring, rank, world):
    PROCESS_GROUP.ULYSSES_PG = dist.new_group([0, 1])
    PROCESS_GROUP.RING_PG = [dist.new_group([i]) for i in range(2)][rank]
"""
    _package(tmp_path, init="import os\nos.environ['TORCH_CUDA_ARCH_LIST'] = '1.2'\n", module=module)
    run_ranks(2, _check_environment, str(tmp_path), before)


# ---------------------------------------------------------------------------------------------------------- four ranks


def _check_meshes(rank: int) -> None:
    """Several meshes in one process, of our own building and of torch's, used in turns."""
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    columns = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("r", "u"))
    meshes = {
        "hybrid": SequenceParallelMesh(2, 2),
        "ulysses": SequenceParallelMesh(4, 1),
        "ring": SequenceParallelMesh(1, 4),
        "cfg": SequenceParallelMesh(1, 2, cfg_degree=2),
        "device mesh": SequenceParallelMesh.from_device_mesh(device_mesh),
        "columns": SequenceParallelMesh.from_device_mesh(columns, ulysses_dim="u", ring_dim="r"),
        "ring of a device mesh": SequenceParallelMesh.from_device_mesh(
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ring"))
        ),
    }
    layers = {name: _layer(mesh) for name, mesh in meshes.items()}
    for _ in range(2):
        for name, mesh in meshes.items():
            _assert_right(mesh, layers[name])

    def ranks(name: str, kind: str) -> list[int] | None:
        group = getattr(meshes[name], f"{kind}_group")
        return None if group is None else dist.get_process_group_ranks(group)

    low = rank - rank % 2
    for name in ("hybrid", "device mesh"):
        assert ranks(name, "ulysses") == [low, low + 1]
        assert ranks(name, "ring") == [rank % 2, rank % 2 + 2]
        assert meshes[name].sequence_rank == rank
    assert (ranks("cfg", "ring"), ranks("cfg", "ulysses")) == ([low, low + 1], None)
    assert ranks("cfg", "cfg") == [rank % 2, rank % 2 + 2]
    assert (meshes["cfg"].cfg_rank, meshes["cfg"].sequence_rank) == (rank // 2, rank % 2)
    assert (ranks("columns", "ulysses"), ranks("columns", "ring")) == ([rank % 2, rank % 2 + 2], [low, low + 1])
    assert meshes["columns"].sequence_rank == [0, 2, 1, 3][rank]
    assert ranks("ring of a device mesh", "ring") == [low, low + 1]
    for order, name in (([[3, 1], [0, 2]], "ulysses"), ([[2, 3], [0, 1]], "ring"), ([[1, 0], [3, 2]], "ulysses")):
        shuffled = DeviceMesh("cpu", torch.tensor(order), mesh_dim_names=("ring", "ulysses"))
        with pytest.raises(ValueError, match=f"do not ascend along '{name}', so their places in its groups are not"):
            SequenceParallelMesh.from_device_mesh(shuffled)
    out, _ = _attend(meshes["hybrid"], layers["hybrid"])
    assert torch.equal(out, _attend(meshes["device mesh"], layers["device mesh"])[0]), "the same groups, the same bits"


def test_meshes_take_turns() -> None:
    run_ranks(4, _check_meshes)


# ----------------------------------------------------------------------------------------------------- a rank that dies

_TIMEOUT_S = 10


def _die_or_report(rank: int, world: int, folder: str, ulysses: int, ring: int, victim: int) -> None:
    """Attends twice; `victim` is gone before the second call. The others write what ended them."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    layer = _layer(SequenceParallelMesh(ulysses, ring))
    _assert_right(layer.mesh, layer)
    (Path(folder) / f"first-{rank}").touch()
    while len(list(Path(folder).glob("first-*"))) < world:
        time.sleep(0.01)
    if rank == victim:
        os._exit(3)
    ended = "returned"
    try:
        _attend(layer.mesh, layer)
    except Exception as error:
        ended = f"raised {type(error).__name__}"
    (Path(folder) / f"end-{rank}").write_text(ended)
    os._exit(0)  # as a framework's launcher would end it: no barrier with a rank that is gone


@pytest.mark.parametrize(("ulysses", "ring", "victim"), [(1, 3, 1), (3, 1, 2), (2, 2, 0)])
def test_death_of_a_rank_ends_the_others(ulysses: int, ring: int, victim: int, tmp_path: Path) -> None:
    world = ulysses * ring
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_die_or_report, args=(rank, world, str(tmp_path), ulysses, ring, victim))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    give_up = time.monotonic() + 6 * _TIMEOUT_S
    for worker in workers:
        worker.join(max(0.0, give_up - time.monotonic()))
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for rank in hung:
        workers[rank].kill()
        workers[rank].join()
    assert not hung, f"ranks {hung} wait for ever for rank {victim}"
    assert workers[victim].exitcode == 3
    ended = {rank: (tmp_path / f"end-{rank}").read_text() for rank in range(world) if rank != victim}
    assert all(text.startswith("raised ") for text in ended.values()), ended


def _check_hung_rank(rank: int) -> None:
    mesh = SequenceParallelMesh(ring_degree=2, timeout=timedelta(seconds=2))
    layer = _layer(mesh)
    world = world_group()
    if rank == 1:
        dist.barrier(group=world)  # hangs in another place until rank 0 has given up
        return
    first, last = layer.shards(GRID).range_of(0)
    with pytest.raises(RuntimeError, match=r"layer 0 is not attended by all ranks: .*start them all anew"):
        layer(*(x[:, first:last] for x in _inputs()), grid=GRID)
    dist.barrier(group=world)


def test_a_hung_rank_is_given_up_after_the_meshs_timeout() -> None:
    run_ranks(2, _check_hung_rank)
