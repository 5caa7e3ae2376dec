"""vllm-omni compiles the blocks (its default): the denoising step must not be compiled in, nor the output changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.vllm_omni.wan import Job, Mesh, built

JOB = Job((4, 6, 9), {"sparsity": 0.6, "start_step": 4})


def _check(rank: int, mesh: Mesh) -> None:
    from vllm_omni.diffusion.compile import regionally_compile

    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    with built(mesh, JOB) as (transformer, forward), torch.no_grad():
        eager = [forward(step) for step in (0, 6)]
        regionally_compile(transformer.model, backend=backend, dynamic=True)
        compiled = [forward(0)]
        compiled_once = len(graphs)
        assert compiled_once > 0
        # dense up to step 3, then sparse
        compiled += [forward(step) for step in range(1, 7)]
        assert len(graphs) == compiled_once, "a step was compiled anew"
        assert relative_error(compiled[0], eager[0]) < 1e-6
        assert relative_error(compiled[6], eager[1]) < 1e-6
        for layer in transformer.sparse_layers():
            assert (layer.dense_calls, layer.sparse_calls) == (1 + 4, 1 + 3)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ulysses=2), Mesh(ring=2), Mesh(ulysses=2, ring=2)], ids=str)
def test_no_step_is_compiled_anew(mesh: Mesh) -> None:
    run_ranks(mesh.ranks, _check, mesh)
