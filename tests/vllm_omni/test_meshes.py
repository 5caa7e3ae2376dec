"""The real Wan transformer gives the same on every mesh of vllm-omni as on one rank: masks alike, outputs to rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sp_sparse import AttentionRecorder, SequenceShards
from tests.oracle import block_rows, expand, masked_attention, relative_error
from tests.ranks import run_ranks
from tests.vllm_omni.wan import Job, Mesh, Result, built, has_ulysses_allgather, run

BLOCK = 16
UNEVEN = {"ulysses_mode": "advanced_uaa"}  # 4 heads over 3 ranks

# 216 tokens: shards of ring 2 and 4 end 12 and 6 tokens past a block. 140 and 75 are padded, where they do not divide.
PLAIN, PADDED, SMALL = (4, 6, 9), (4, 5, 7), (3, 5, 5)

CASES = {
    "ulysses-2": (Mesh(ulysses=2), PLAIN, {}),
    "ulysses-2-padded": (Mesh(ulysses=2), SMALL, {}),
    "ulysses-3-uneven-heads": (Mesh(ulysses=3), PLAIN, UNEVEN),
    "ulysses-3-uneven-heads-padded": (Mesh(ulysses=3), PADDED, UNEVEN),
    "ring-2": (Mesh(ring=2), PLAIN, {}),
    "ring-2-off-edges": (Mesh(ring=2), PADDED, {}),
    "ring-4": (Mesh(ring=4), PLAIN, {}),
    "hybrid-2x2": (Mesh(ulysses=2, ring=2), PLAIN, {}),
    "hybrid-2x4": (Mesh(ulysses=2, ring=4), PLAIN, {}),
    "hybrid-3x2-uneven-heads": (Mesh(ulysses=3, ring=2), PLAIN, UNEVEN),
    "allgather-2": (Mesh(allgather=2), PLAIN, {}),
    "allgather-2-padded": (Mesh(allgather=2), SMALL, {}),
    "allgather-4": (Mesh(allgather=4), PLAIN, {}),
}
# vllm-omni 0.30 refuses them itself. 140 tokens over 4 and 6 ranks, 75 over 4: lengths that do not divide.
ULYSSES_ALLGATHER = {
    "ulysses-2-allgather-2": (Mesh(ulysses=2, allgather=2), PLAIN, {}),
    "ulysses-2-allgather-2-padded": (Mesh(ulysses=2, allgather=2), SMALL, {}),
    "ulysses-2-allgather-3-padded": (Mesh(ulysses=2, allgather=3), PADDED, {}),
    "ulysses-3-allgather-2-uneven-heads": (Mesh(ulysses=3, allgather=2), PLAIN, UNEVEN),
    "ulysses-3-allgather-2-uneven-heads-padded": (Mesh(ulysses=3, allgather=2), PADDED, UNEVEN),
}
if has_ulysses_allgather():
    CASES |= ULYSSES_ALLGATHER


@cache
def _single(grid: tuple[int, int, int], sparsity: float) -> Result:
    return run(Mesh(), Job(grid, {"sparsity": sparsity}))[0]


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("name", CASES)
def test_every_mesh_equals_one_rank(name: str, sparsity: float) -> None:
    mesh, grid, parallel = CASES[name]
    expected = _single(grid, sparsity)
    results = run(mesh, Job(grid, {"sparsity": sparsity}, parallel=parallel))
    for rank, result in enumerate(results):
        assert (result.sparse, result.dense) == (2, 0), "each self-attention call runs sparse"
        assert relative_error(result.output, expected.output) < 1e-5
        for (layer, mask), (wanted_layer, whole) in zip(result.masks, expected.masks, strict=True):
            assert layer == wanted_layer
            wanted = _share(whole, mesh, grid, rank)
            assert torch.equal(mask[:, : wanted.shape[1]], wanted), (rank, layer, "the mask differs")
    names = [name for name, degree in (("ulysses", mesh.ulysses), ("allgather_kv", mesh.allgather)) if degree > 1]
    assert results[0].strategy == ("_".join(names) or "ring"), "vllm-omni shared the sequence"


def _share(whole: Tensor, mesh: Mesh, grid: tuple[int, int, int], rank: int) -> Tensor:
    """The heads and query blocks of a rank. vllm-omni rounds its heads up: the last rank's may be none."""
    heads = -(-whole.shape[1] // mesh.ulysses)
    ring_rank, ulysses_rank = divmod(rank, mesh.ulysses)
    tokens = grid[0] * grid[1] * grid[2]
    shards = SequenceShards.equal(tokens, mesh.ranks).grouped(mesh.ulysses).realigned(BLOCK)
    rows = block_rows(*shards.range_of(ring_rank), BLOCK)
    return whole[:, ulysses_rank * heads : (ulysses_rank + 1) * heads, rows]


def _check_oracle(rank: int) -> None:
    """On one rank, each layer's output is float64 dense attention under its mask."""
    with built(Mesh(), Job(PLAIN)) as (transformer, forward), torch.no_grad():
        calls: list[tuple[Any, ...]] = []
        recorder = AttentionRecorder(keep_masks=True)
        for layer in transformer.sparse_layers():
            layer.record(recorder)
        for block in transformer.model.blocks:
            block.attn1.attn.register_forward_hook(lambda module, args, out: calls.append((*args[:3], out)))
        forward(3)
        assert len(calls) == 2
        for (query, key, value, out), (_, _, _, mask) in zip(calls, recorder.masks, strict=True):
            tokens = expand(mask.to_dense(), (BLOCK, BLOCK), 216, 216)
            expected, _ = masked_attention(query, key, value, tokens, 32**-0.5)
            assert relative_error(out, expected) < 1e-6
            dense, _ = masked_attention(query, key, value, torch.ones_like(tokens), 32**-0.5)
            assert relative_error(out, dense) > 1e-2, "the mask makes no difference: the case would not see it missing"


def test_one_rank_equals_float64_dense_under_the_mask() -> None:
    run_ranks(1, _check_oracle)


def test_token_order_where_a_rank_holds_every_token() -> None:
    jobs = [Job(SMALL, options={"block_size": BLOCK, "token_order": order}) for order in ("raster", "hilbert")]
    raster, single = (run(Mesh(), job)[0] for job in jobs)
    for result in run(Mesh(ulysses=2), jobs[1]):
        assert relative_error(result.output, single.output) < 1e-5
    assert relative_error(single.output, raster.output) > 1e-3, "other tokens share a block"
    everything = run(Mesh(), Job(SMALL, {"sparsity": 1e-6}, jobs[1].options))[0]
    dense = run(Mesh(), Job(SMALL, backend="TORCH_SDPA"))[0]
    assert (everything.sparse, everything.dense) == (2, 0)
    assert relative_error(everything.output, dense.output) < 1e-5, "every block attended: the order must not be seen"


@pytest.mark.parametrize(
    "options",
    [{"kv_exchange": "all_gather"}, {"selector": "window", "window": 2, "remainder": "mean"}, {"remainder": "linear"}],
    ids=str,
)
def test_other_settings_on_a_hybrid(options: dict[str, Any]) -> None:
    own = {} if options.get("selector") == "window" else {"sparsity": 0.6}
    job = Job(PLAIN, own, {"block_size": BLOCK, **options})
    expected = run(Mesh(), job)[0]
    for result in run(Mesh(ulysses=2, ring=2), job):
        assert relative_error(result.output, expected.output) < 1e-5
