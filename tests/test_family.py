"""Wan 2.1, video-to-video, VACE and Animate through the real diffusers pipelines, in miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.wan_family import V2V_STEPS, family_pipeline, pictures, run

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
MEMBERS = ("t2v", "i2v", "flf", "v2v", "vace", "animate")
# 75 tokens, with VACE's reference 100: neither blocks nor ranks divide it.
RAGGED = {"height": 80, "width": 80}
MESHES = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]

_single: dict[str, Tensor] = {}


def _one_rank(member: str) -> Tensor:
    """Sparse: computed once in the parent, inherited by forked ranks."""
    if member not in _single:
        pipe = family_pipeline(member)
        enable_sparse_attention(pipe, CONFIG)
        _single[member] = run(pipe, **RAGGED)
    return _single[member]


@pytest.mark.parametrize("member", MEMBERS)
def test_density_one_equals_the_models_own_dense(member: str) -> None:
    pipe = family_pipeline(member)
    dense = run(pipe, **RAGGED)
    with enable_sparse_attention(pipe, replace(CONFIG, topk=1.0)):
        assert relative_error(run(pipe, **RAGGED), dense) < 1e-5
    assert torch.equal(run(pipe, **RAGGED), dense), "removal must restore the model exactly"
    assert relative_error(_one_rank(member), dense) > 2e-3


def _calls(member: str) -> int:
    """Of self-attention in a forward: VACE's control path has two blocks beside three layers."""
    return 5 if member == "vace" else 2


def _check_member(rank: int, member: str, ulysses: int, ring: int, cfg: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring, cfg)
    pipe, recorder = family_pipeline(member), AttentionRecorder()
    enable_sparse_attention(pipe, CONFIG, mesh, recorder)
    assert relative_error(run(pipe, **RAGGED), _one_rank(member)) < 2e-5
    summary = recorder.summary(mesh.groups)
    steps = V2V_STEPS if member == "v2v" else 2
    segments = 2 if member == "animate" else 1
    assert summary["calls"] == {"reference": _calls(member) * steps * segments * (2 // cfg)}
    assert {row["step"] for row in summary["densities"]} == set(range(steps))
    assert all(0.35 < row["density"] < 0.65 for row in summary["densities"])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_is_the_same_on_every_mesh(member: str, mesh: tuple[int, int, int]) -> None:
    _one_rank(member)
    run_ranks(mesh[0] * mesh[1] * mesh[2], _check_member, member, *mesh)


def _check_failure_is_heard(rank: int, member: str, place: str, degrees: tuple[int, int, int]) -> None:
    pipe = family_pipeline(member)
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees))

    def fail(*_: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("no memory")

    if rank == 1:
        handle = pipe.transformer.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run(pipe, **RAGGED)
    assert relative_error(run(pipe, **RAGGED), _one_rank(member)) < 2e-5, "the ranks are in step again"


@pytest.mark.parametrize(
    ("member", "place", "degrees"),
    [
        ("vace", "vace_blocks.0.ffn", (1, 2, 1)),
        ("animate", "face_adapter.0.to_out", (2, 1, 1)),
        ("v2v", "blocks.0.ffn", (1, 1, 2)),
    ],
)
def test_a_failure_on_one_rank_is_heard_by_all(member: str, place: str, degrees: tuple[int, int, int]) -> None:
    _one_rank(member)
    run_ranks(2, _check_failure_is_heard, member, place, degrees)


def test_a_control_path_is_scheduled_as_the_layers_that_it_hints() -> None:
    pipe, recorder = family_pipeline("vace"), AttentionRecorder()
    table = ((1.0, 0.5), (0.25, 0.25), (0.5, 1.0))
    config = replace(CONFIG, schedule="table", schedule_table=table, keep_diagonal=False)
    handle = enable_sparse_attention(pipe, config, recorder=recorder)
    assert [layer.layer for layer in handle.layers] == [0, 2, 0, 1, 2]
    run(pipe, guidance_scale=1.0, reference_images=None)
    rows = {(row["layer"], row["step"]): row for row in recorder.summary()["densities"]}
    for layer, densities in enumerate(table):
        for step, density in enumerate(densities):
            row = rows[layer, step]
            if density == 1.0:
                assert row["dense_calls"] == 2, "layer and control block alike"
            else:
                assert row["density"] == pytest.approx(density, abs=0.05)


def test_a_member_refuses_what_it_cannot_do() -> None:
    vace, animate = family_pipeline("vace"), family_pipeline("animate")
    own = animate.transformer.face_adapter[0].processor
    with (
        enable_sparse_attention(vace, CONFIG),
        pytest.raises(ValueError, match=r"have 112 tokens and hidden_states 64"),
    ):
        run(vace, height=64, width=64, num_frames=9, video=pictures(21, 2), mask=None)
    with enable_sparse_attention(animate, CONFIG):
        animate.transformer.face_adapter[0].set_processor(own)
        with pytest.raises(RuntimeError, match=r"was replaced .*call remove\(\) first"):
            run(animate)
    faces = r"gives 2 latent frames and the video has 4; give one face frame"
    with torch.no_grad(), enable_sparse_attention(animate, CONFIG), pytest.raises(ValueError, match=faces):
        animate.transformer(
            torch.zeros(1, 36, 4, 8, 8),
            torch.tensor([900]),
            torch.zeros(1, 512, 32),
            torch.zeros(1, 5, 32),
            torch.zeros(1, 16, 3, 8, 8),
            torch.zeros(1, 3, 4, 16, 16),
        )
    assert animate.transformer.face_adapter[0].processor is own
