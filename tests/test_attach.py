"""How sparse attention is placed on a Wan model and taken off, and what is refused before."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
from torch.torch_version import TorchVersion

pytest.importorskip("diffusers")

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import inputs, run, tiny_pipeline, tiny_transformer

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)


def _traces(model: Any) -> list[Any]:
    return [
        (vars(m).keys(), len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "processor", None))
        for m in model.modules()
    ]


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
@pytest.mark.parametrize(
    "place", ["attn1.set_processor", "rope.register_forward_hook", "proj_out.register_forward_hook"]
)
def test_a_failed_attach_leaves_nothing(expert: str, place: str) -> None:
    pipe = tiny_pipeline("t2v")
    before = [_traces(model) for model in (pipe.transformer, pipe.transformer_2)]
    module, method = place.split(".")
    failing = getattr(pipe, expert)
    owner = failing.blocks[1].attn1 if module == "attn1" else getattr(failing, module)
    with mock.patch.object(owner, method, side_effect=OSError("no place")), pytest.raises(OSError, match="no place"):
        enable_sparse_attention(pipe, CONFIG)
    assert [_traces(model) for model in (pipe.transformer, pipe.transformer_2)] == before
    with enable_sparse_attention(pipe, CONFIG):
        run(pipe)


def _check_failed_attach(rank: int) -> None:
    model = tiny_transformer()
    before = _traces(model)
    patch = mock.patch.object(model.rope, "register_forward_hook", side_effect=OSError("no place"))
    if rank == 1:
        patch.start()
    with pytest.raises(RuntimeError, match="no place"):
        enable_sparse_attention(model, CONFIG, SequenceParallelMesh(ring_degree=2))
    if rank == 1:
        patch.stop()
    assert _traces(model) == before


def test_a_failed_attach_on_one_rank_is_undone_on_all() -> None:
    run_ranks(2, _check_failed_attach)


@pytest.mark.parametrize("name", ["cache_context", "enable_parallelism", "forward"])
def test_a_method_wrapped_since_stays_when_removed(name: str) -> None:
    """And what it has wrapped is then the model's own again."""
    model = tiny_transformer()
    with torch.no_grad():
        dense = model(**inputs(model))[0]
    handle = enable_sparse_attention(model, CONFIG)
    ours, calls = getattr(model, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return ours(*args, **kwargs)

    setattr(model, name, wrapper)
    handle.remove()
    assert getattr(model, name) is wrapper
    with torch.no_grad(), model.cache_context("cond"):
        assert torch.equal(model(**inputs(model))[0], dense)
    with pytest.raises(TypeError, match="nothing"):  # diffusers' own, rather than our refusal
        model.enable_parallelism(nothing=1)
    assert calls == [name]
    with enable_sparse_attention(model, CONFIG), torch.no_grad(), model.cache_context("cond"):
        assert relative_error(model(**inputs(model))[0], dense) > 1e-2


def test_a_processor_set_since_stays_when_removed() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        dense = model(**inputs(model))[0]
    handle = enable_sparse_attention(model, CONFIG)
    attn = model.blocks[0].attn1
    ours = attn.processor

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    attn.set_processor(wrapper)
    handle.remove()
    assert attn.processor is wrapper
    with torch.no_grad():
        assert torch.equal(model(**inputs(model))[0], dense)


@pytest.mark.parametrize("in_pipeline", [False, True])
@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "forward"])
def test_a_model_compiled_as_a_whole_is_refused(how: str, in_pipeline: bool) -> None:
    target = tiny_pipeline("t2v")
    model = target.transformer_2
    if how == "torch.compile":
        model = torch.compile(model, backend="eager")
        target.transformer_2 = model
    elif how == "model.compile":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    before = _traces(target.transformer)
    with pytest.raises(RuntimeError, match=r"compiled as a whole.*compile_repeated_blocks"):
        enable_sparse_attention(target if in_pipeline else model, CONFIG)
    assert _traces(target.transformer) == before


@pytest.mark.parametrize("name", ["SkyReelsV2Transformer3DModel", "WanAnimate2Transformer3DModel"])
def test_other_transformers_are_refused_by_name(name: str) -> None:
    import diffusers

    kind = getattr(diffusers, name)
    model = kind.__new__(kind)  # its class is all that is looked at
    torch.nn.Module.__init__(model)
    taken = r"WanTransformer3DModel, .* and the pipelines made of them, such as WanPipeline.*backend 'none'"
    with pytest.raises(TypeError, match=rf"^{name} is not taken: .*{taken}"):
        enable_sparse_attention(model, CONFIG)
    pipe = tiny_pipeline("t2v")
    pipe.transformer_2 = model
    with pytest.raises(TypeError, match=rf"^WanPipeline has WanTransformer3DModel and {name}, which is not .*{taken}"):
        enable_sparse_attention(pipe, CONFIG)


@pytest.mark.parametrize("change", [{"schedule": "aggressive"}, {"schedule": "conservative"}, {"dense_steps": 1}])
def test_a_transformer_whose_loop_tells_no_step_needs_its_pipeline(change: dict[str, Any]) -> None:
    pipe = tiny_pipeline("i2v")
    with (
        enable_sparse_attention(pipe.transformer, replace(CONFIG, **change)),
        pytest.raises(ValueError, match=r"needs the denoising step.*the pipeline"),
    ):
        run(pipe)
    with enable_sparse_attention(pipe, replace(CONFIG, **change)):
        run(pipe)
    with enable_sparse_attention(pipe.transformer, CONFIG):
        run(pipe)
    if TorchVersion(version("diffusers")) < "0.42":
        return  # no loop tells it there
    text_to_video = tiny_pipeline("t2v")
    with enable_sparse_attention(text_to_video.transformer, replace(CONFIG, **change)):
        run(text_to_video)  # this loop tells it
