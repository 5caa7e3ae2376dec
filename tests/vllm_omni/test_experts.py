"""Wan 2.2 as a pipeline calls it: two transformers whose layers have the same names, two guidance branches a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from launch.benchmarks.omni_model import OmniTransformer, fill
from tests.ranks import run_ranks
from tests.vllm_omni.wan import SHAPE, Job, Mesh, built

JOB = Job((4, 6, 9))


def _second_expert(first: OmniTransformer) -> OmniTransformer:
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel
    from vllm_omni.diffusion.registry import _apply_sequence_parallel_if_enabled

    with first.context(None), set_current_diffusion_config(first.config):
        model = WanTransformer3DModel(**SHAPE).eval().requires_grad_(False)
        fill(model)
        for parameter in model.parameters():
            parameter.mul_(1.2)
        pipeline = nn.Module()
        pipeline.transformer_2 = model
        _apply_sequence_parallel_if_enabled(pipeline, first.config)
    return OmniTransformer(model, first.config, first.vllm_config)


def _check(rank: int, mesh: Mesh) -> None:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, SHAPE["in_channels"], 4, 12, 18, generator=generator)
    branches = torch.randn(2, 1, 7, SHAPE["text_dim"], generator=generator)
    with built(mesh, JOB) as (first, _), torch.no_grad():
        second = _second_expert(first)
        names = [[layer.layer for layer in expert.sparse_layers()] for expert in (first, second)]
        assert names[0] == names[1] == [0, 1]

        def call(expert: OmniTransformer, branch: int) -> Tensor:
            return expert(latents, branches[branch], step=3)

        apart = {(i, b): call(expert, b) for i, expert in enumerate((first, second)) for b in (0, 1)}
        assert not torch.allclose(apart[0, 0], apart[1, 0])
        for branch in (0, 1, 1, 0):
            for i, expert in enumerate((first, second)):
                assert torch.equal(call(expert, branch), apart[i, branch])
        counts = [layer.sparse_calls for expert in (first, second) for layer in expert.sparse_layers()]
        assert counts == [2 + 4] * 4


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ulysses=2), Mesh(ring=2)], ids=str)
def test_experts_and_branches_are_kept_apart(mesh: Mesh) -> None:
    run_ranks(mesh.ranks, _check, mesh)
