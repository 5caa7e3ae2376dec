"""Dense layers and steps are vllm-omni's own dense attention on the same mesh, and cross-attention is never touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.vllm_omni.wan import Job, Mesh, built, run

GRID, PADDED = (4, 6, 9), (3, 5, 5)
OWN = Job(GRID, backend="TORCH_SDPA")
MESHES = pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(ulysses=2), Mesh(ring=2), Mesh(ulysses=2, ring=2), Mesh(allgather=2)], ids=str
)
NUM_STEPS = {"block_size": 16, "num_steps": 10}


@MESHES
def test_dense_steps_are_those_of_vllm_omni(mesh: Mesh) -> None:
    own, one = run(mesh, OWN)[0], run(Mesh(), Job(GRID))[0]
    first, second = run(mesh, Job(GRID, {"sparsity": 0.6, "start_step": 3}, steps=(2, 3)))[0].output
    assert torch.equal(first, own.output[0]), "step 2 is dense, to the last bit as vllm-omni computes it on this mesh"
    assert relative_error(second, one.output[0]) < 1e-5, "step 3 is sparse"


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ulysses=2), Mesh(ring=2)], ids=str)
def test_dense_layers(mesh: Mesh) -> None:
    job = Job(GRID, {"sparsity": 0.6, "skip_layers": "1"})
    expected = run(Mesh(), job)[0]
    result = run(mesh, job)[0]
    assert (result.sparse, result.dense) == (1, 1)
    assert [layer for layer, _ in result.masks] == [0]
    assert relative_error(result.output, expected.output) < 1e-5


@pytest.mark.parametrize(
    ("block_sparse", "options", "dense"),
    [
        ({"end_step": 2}, NUM_STEPS, [False, False, False, True]),
        ({"start_step": 1, "end_step": 8}, NUM_STEPS, [True, False, True, True]),
        (None, {**NUM_STEPS, "schedule": "table", "schedule_table": [[1.0, 0.4]]}, [True, True, False, False]),
        ({"sparsity": 0.0}, {"block_size": 16}, [True] * 4),
    ],
    ids=["end", "both-ends", "table", "nothing-left-out"],
)
def test_which_steps_are_dense(block_sparse: dict[str, Any] | None, options: dict[str, Any], dense: list[bool]) -> None:
    given = {} if block_sparse is None else {"sparsity": 0.6, **block_sparse}  # a table has densities of its own
    result = run(Mesh(), Job(GRID, given, options, steps=(0, 1, 7, 8)))[0]
    own = run(Mesh(), OWN)[0].output[0]
    assert [torch.equal(output, own) for output in result.output] == dense
    assert (result.sparse, result.dense) == (2 * dense.count(False), 2 * dense.count(True))


@pytest.mark.parametrize("mesh", [Mesh(ulysses=2), Mesh(allgather=2)], ids=str)
def test_dense_steps_do_not_attend_padding(mesh: Mesh) -> None:
    """As vllm-omni alone does: it pads this sequence, and attends what it padded."""
    one = run(Mesh(), replace(OWN, grid=PADDED))[0].output
    dense = run(mesh, Job(PADDED, {"sparsity": 0.0}))[0]
    assert dense.dense == 2
    assert relative_error(dense.output, one) < 1e-5
    assert relative_error(run(mesh, replace(OWN, grid=PADDED))[0].output, one) > 1e-4


def _check_cross(rank: int, mesh: Mesh, job: Job, expected: str) -> None:
    with built(mesh, job) as (transformer, forward), torch.no_grad():
        reached: list[nn.Module] = []
        for block in transformer.model.blocks:
            impl = block.attn2.attn.attention
            if getattr(impl, "sparse", "of vllm-omni") is None:  # SP_SPARSE is the default: it hands on
                impl = impl.dense._local
            assert type(impl).__name__ == expected
            block.attn2.attn.register_forward_hook(lambda module, args, out: reached.append(module))
        forward(3)
        assert len(reached) == 2
        assert all(block.attn1.attn.attention.sparse.sparse_calls == 1 for block in transformer.model.blocks)


def test_cross_attention_keeps_its_own_backend() -> None:
    run_ranks(2, _check_cross, Mesh(ulysses=2), Job(GRID), "SDPAImpl")


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ring=2)], ids=str)
def test_as_the_default_of_all_roles_it_leaves_cross_attention_alone(mesh: Mesh) -> None:
    job = Job(GRID, default="SP_SPARSE")
    run_ranks(mesh.ranks, _check_cross, mesh, job, "SDPAImpl")
    assert torch.equal(run(mesh, job)[0].output, run(mesh, Job(GRID, {"sparsity": 0.6}))[0].output)
