"""Wan 2.2 through the real diffusers pipelines, in miniature."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import inputs, run, tiny_pipeline, tiny_transformer

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
FAMILIES = ("t2v", "i2v", "ti2v", "ti2v-image")
# 75 tokens: neither blocks nor ranks divide it.
RAGGED = {"height": 80, "width": 80, "num_frames": 9}

_cache: dict[tuple[str, bool], Tensor] = {}


def _single(family: str, ragged: bool) -> Tensor:
    """One rank, sparse: computed once in the parent, inherited by forked ranks."""
    if (family, ragged) not in _cache:
        pipe = tiny_pipeline(family)
        enable_sparse_attention(pipe, CONFIG)
        _cache[family, ragged] = run(pipe, **(RAGGED if ragged else {}))
    return _cache[family, ragged]


@pytest.mark.parametrize("family", FAMILIES)
def test_topk_one_equals_the_models_own_dense(family: str) -> None:
    pipe = tiny_pipeline(family)
    dense = run(pipe)
    with enable_sparse_attention(pipe, replace(CONFIG, topk=1.0, token_order="tile")):
        assert relative_error(run(pipe), dense) < 1e-5
    assert torch.equal(run(pipe), dense), "removal must restore the model exactly"


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_differs_from_dense(family: str) -> None:
    """Without this, a sparse path that silently ran dense would pass every comparison of meshes."""
    assert relative_error(_single(family, False), run(tiny_pipeline(family))) > 1e-2


def _check_family(rank: int, family: str, ulysses: int, ring: int, cfg: int) -> None:
    mesh = SequenceParallelMesh(ulysses, ring, cfg)
    for ragged in (False, True):
        pipe = tiny_pipeline(family)
        recorder = AttentionRecorder()
        enable_sparse_attention(pipe, CONFIG, mesh, recorder)
        error = relative_error(run(pipe, **(RAGGED if ragged else {})), _single(family, ragged))
        assert error < 2e-5, (family, ragged, error)
        summary = recorder.summary(mesh.groups)
        assert set(summary["calls"]) == {"reference"}
        assert {row["expert"] for row in summary["densities"]} == ({0} if family.startswith("ti2v") else {0, 1})
        assert {row["step"] for row in summary["densities"]} == {0, 1, 2, 3}
        assert all(0.35 < row["density"] < 0.65 for row in summary["densities"])


MESHES = [(2, 1, 1), (1, 2, 1), (3, 1, 1), (1, 4, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize(("ulysses", "ring", "cfg"), MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_is_the_same_on_every_mesh(family: str, ulysses: int, ring: int, cfg: int) -> None:
    for ragged in (False, True):
        _single(family, ragged)
    run_ranks(ulysses * ring * cfg, _check_family, family, ulysses, ring, cfg)


def _check_remainder(rank: int, expected: Tensor, ulysses: int, ring: int, cfg: int) -> None:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, replace(CONFIG, remainder="linear"), SequenceParallelMesh(ulysses, ring, cfg))
    assert relative_error(run(pipe, **RAGGED), expected) < 2e-5


def test_a_remainder_is_the_same_on_every_mesh() -> None:
    pipe = tiny_pipeline("t2v")
    with enable_sparse_attention(pipe, replace(CONFIG, remainder="linear")):
        expected = run(pipe, **RAGGED)
    dense = run(pipe, **RAGGED)
    assert relative_error(expected, _single("t2v", True)) > 1e-3
    assert 1e-3 < relative_error(expected, dense) < relative_error(_single("t2v", True), dense)
    for mesh in ((2, 1, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2)):
        run_ranks(mesh[0] * mesh[1] * mesh[2], _check_remainder, expected, *mesh)


@pytest.mark.parametrize("family", FAMILIES)
def test_schedule_follows_the_pipelines_steps(family: str) -> None:
    """Image-to-video tells cache_context no step: it comes from the scheduler there."""
    pipe = tiny_pipeline(family)
    recorder = AttentionRecorder()
    table = ((1.0, 0.5, 0.5, 0.25), (1.0, 0.25, 0.25, 0.25))
    config = replace(CONFIG, schedule="table", schedule_table=table, keep_diagonal=False)
    enable_sparse_attention(pipe, config, recorder=recorder)
    run(pipe)
    densities = {(row["layer"], row["step"]): row for row in recorder.summary()["densities"]}
    for layer in (0, 1):
        assert densities[layer, 0]["dense_calls"] == 2
        assert [densities[layer, step]["density"] for step in (1, 2, 3)] == list(table[layer][1:])


def test_second_expert_has_its_own_schedule() -> None:
    pipe = tiny_pipeline("t2v")
    recorder = AttentionRecorder()
    enable_sparse_attention(pipe, replace(CONFIG, topk=0.5, topk_2=0.25, keep_diagonal=False), recorder=recorder)
    run(pipe)
    rows = recorder.summary()["densities"]
    assert {row["expert"]: row["density"] for row in rows} == {0: 0.5, 1: 0.25}


def test_backend_none_touches_nothing() -> None:
    pipe = tiny_pipeline("t2v")
    before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    enable_sparse_attention(pipe, SparseAttentionConfig())
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    for name, module in pipe.transformer.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_removal_leaves_no_trace() -> None:
    model = tiny_transformer()
    processors = [block.attn1.processor for block in model.blocks]
    keys = set(vars(model))
    handle = enable_sparse_attention(model, CONFIG)
    handle.remove()
    handle.remove()
    assert [block.attn1.processor for block in model.blocks] == processors
    assert set(vars(model)) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cross_attention_is_left_alone() -> None:
    model = tiny_transformer()
    cross = [block.attn2.processor for block in model.blocks]
    counted: Counter[str] = Counter()
    recorder = AttentionRecorder()
    enable_sparse_attention(model, CONFIG, recorder=recorder)
    assert [block.attn2.processor for block in model.blocks] == cross
    for block in model.blocks:
        block.attn2.register_forward_hook(lambda *_: counted.update(["cross"]))
    with torch.no_grad():
        model(**inputs(model))
    assert recorder.summary()["calls"] == {"reference": 2}
    assert counted["cross"] == 2


def test_lora_and_fused_projections() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_transformer()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        expected = model(**inputs(model))[0]
        with enable_sparse_attention(model, replace(CONFIG, topk=1.0)):
            assert relative_error(model(**inputs(model))[0], expected) < 1e-5
    plain = tiny_transformer()
    with torch.no_grad(), enable_sparse_attention(plain, CONFIG):
        before = plain(**inputs(plain))[0]
        plain.fuse_qkv_projections()
        assert plain.blocks[0].attn1.fused_projections
        assert relative_error(plain(**inputs(plain))[0], before) < 1e-5


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_blocks_do_not_recompile_from_step_to_step(fullgraph: bool) -> None:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, replace(CONFIG, schedule="aggressive", remainder="linear" if fullgraph else "drop"))
    expected = run(pipe)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(len(compiled))
        return graph.forward

    for model in (pipe.transformer, pipe.transformer_2):
        model.compile_repeated_blocks(backend=backend, fullgraph=fullgraph)
    try:
        assert relative_error(run(pipe), expected) < 1e-5
        after_first = len(compiled)
        run(pipe)
        # One graph serves every block of both experts: attention is one operator in it.
        assert after_first == 1
        assert len(compiled) == after_first, "a later step or run compiled again"
    finally:
        torch.compiler.reset()


def test_refuses_what_it_cannot_serve() -> None:
    model = tiny_transformer()
    with pytest.raises(TypeError, match="WanTransformer3DModel"):
        enable_sparse_attention(torch.nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match="unknown sparse attention backend 'nope'"):
        enable_sparse_attention(model, replace(CONFIG, backend="nope"))
    assert not any(m._forward_hooks for m in model.modules()), "a refusal must leave nothing half-done"
    handle = enable_sparse_attention(model, CONFIG)
    with pytest.raises(RuntimeError, match="sparse already"):
        enable_sparse_attention(model, CONFIG)
    with pytest.raises(RuntimeError, match="SequenceParallelMesh"):
        model.enable_parallelism(config=None)
    handle.remove()
    with mock.patch.object(model, "_parallel_config", object()), pytest.raises(RuntimeError, match="parallel_config"):
        enable_sparse_attention(model, CONFIG)


def test_a_replaced_processor_is_noticed() -> None:
    model = tiny_transformer()
    own = model.blocks[1].attn1.processor
    enable_sparse_attention(model, CONFIG)
    model.blocks[1].attn1.set_processor(own)
    with torch.no_grad(), pytest.raises(RuntimeError, match="was replaced"):
        model(**inputs(model))


def test_unknown_step_is_an_error_only_where_it_matters() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        with enable_sparse_attention(model, CONFIG):
            model(**inputs(model))
        with (
            enable_sparse_attention(model, replace(CONFIG, schedule="aggressive")),
            pytest.raises(ValueError, match="needs the denoising step"),
        ):
            model(**inputs(model))


def test_no_backward() -> None:
    model = tiny_transformer()
    with enable_sparse_attention(model, CONFIG), pytest.raises(ValueError, match="no_grad"):
        model(**inputs(model))


def _check_cfg_order(rank: int) -> None:
    pipe = tiny_pipeline("t2v")
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(cfg_degree=2))
    with pytest.raises(RuntimeError, match="guidance"):
        run(pipe, guidance_scale=1.0)


def test_cfg_halves_need_guidance() -> None:
    run_ranks(2, _check_cfg_order)


def _check_differing_ranks(rank: int) -> None:
    config = replace(CONFIG, topk=0.4 if rank == 0 else 0.5)
    with pytest.raises(RuntimeError, match="ranks differ"):
        enable_sparse_attention(tiny_transformer(), config, SequenceParallelMesh(ring_degree=2))


def test_ranks_with_different_settings_are_told_apart() -> None:
    run_ranks(2, _check_differing_ranks)
