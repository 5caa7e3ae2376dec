"""`--fsdp`: weights dealt out over all ranks give the videos of one rank that has them whole, and failures still end all."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from torch.distributed.fsdp import FSDPModule

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.generate.fsdp import world_mesh
from sp_sparse.generate.models import transformers_of
from sp_sparse.generate.placement import Placement
from sp_sparse.integrations.diffusers import enable_sparse_attention
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import run, tiny_pipeline

CONFIG = SparseAttentionConfig(
    backend="reference", topk=0.4, schedule="constant", block_size=(16, 16), token_order="hilbert"
)
SOON_S = 15.0

# Ulysses, ring and CFG degrees.
ULYSSES, RING, HYBRID, HALVES, HALVES_OF_TWO = (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)

_cache: dict[str, Tensor] = {}


def _single(family: str) -> Tensor:
    """One rank with whole weights: computed once in the parent, inherited by forked ranks."""
    if family not in _cache:
        pipe = tiny_pipeline(family)
        enable_sparse_attention(pipe, CONFIG)
        _cache[family] = run(pipe)
    return _cache[family]


def _dealt_out(family: str, degrees: tuple[int, int, int]) -> Any:
    pipe = tiny_pipeline(family)
    placement = Placement(torch.device("cpu"), torch.float32, False, world_mesh(torch.device("cpu")))
    for transformer in transformers_of(pipe):
        placement.place(transformer)
    placement.place_text_encoder(pipe.text_encoder)
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees))
    return pipe


def _check_video(rank: int, family: str, degrees: tuple[int, int, int]) -> None:
    pipe = _dealt_out(family, degrees)
    blocks = [*pipe.text_encoder.encoder.block, *(b for model in transformers_of(pipe) for b in model.blocks)]
    assert all(isinstance(block, FSDPModule) for block in blocks)
    whole, held = (
        sum(count(weight) for block in blocks for weight in block.parameters())
        for count in (Tensor.numel, lambda weight: weight.to_local().numel())
    )
    world = degrees[0] * degrees[1] * degrees[2]
    assert held < 1.03 * whole / world
    for _ in range(2):
        assert relative_error(run(pipe), _single(family)) < 2e-5
    for model in transformers_of(pipe):
        assert not model._get_fsdp_state()._comm_ctx.post_forward_order, "grows with every forward"


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("t2v", ULYSSES), ("t2v", RING), ("i2v", HYBRID), ("ti2v", HALVES), ("t2v", HALVES_OF_TWO)],
)
def test_dealt_out_weights_give_the_video_of_one_rank(family: str, degrees: tuple[int, int, int]) -> None:
    _single(family)
    run_ranks(degrees[0] * degrees[1] * degrees[2], _check_video, family, degrees)


def _fail_in(module: Any, call: int, before: bool) -> None:
    """`module` raises before or after its `call`-th call from now, once."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError("no memory")

    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)


def _check_heard(rank: int, degrees: tuple[int, int, int], failing: int, place: str, call: int, before: bool) -> None:
    pipe = _dealt_out("t2v", degrees)
    if rank == failing:
        _fail_in(pipe.transformer.get_submodule(place), call, before)
    start = time.monotonic()
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as raised:
        run(pipe)
    assert time.monotonic() - start < SOON_S
    told = f"another rank failed, and with it this step here (rank {failing}: OutOfMemoryError: no memory)"
    assert str(raised.value).startswith("no memory" if rank == failing else told)
    for _ in range(2):
        assert relative_error(run(pipe), _single("t2v")) < 2e-5


@pytest.mark.parametrize(
    ("degrees", "failing", "place", "call", "before"),
    [
        (ULYSSES, 1, "blocks.0", 1, True),
        (ULYSSES, 0, "blocks.0.ffn", 2, False),
        (ULYSSES, 1, "blocks.1.ffn", 1, False),
        (RING, 0, "condition_embedder", 1, False),
        (HALVES, 1, "blocks.0.ffn", 2, False),
        # Within attention, which is no collective where a half is one rank.
        (HALVES, 0, "blocks.0.attn1.to_out.0", 1, True),
        # The whole transformer: before its own forward, of either half.
        (HALVES, 0, "", 1, True),
        (HALVES, 1, "", 2, True),
        (HALVES_OF_TWO, 2, "blocks.1.ffn", 1, False),
    ],
)
def test_a_rank_that_fails_between_all_gathers_is_heard_by_all(
    degrees: tuple[int, int, int], failing: int, place: str, call: int, before: bool
) -> None:
    _single("t2v")
    run_ranks(degrees[0] * degrees[1] * degrees[2], _check_heard, degrees, failing, place, call, before)
