"""`kv_exchange=auto`: what is chosen for which ranks, that all ranks choose alike, that it is the same as asking for it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sp_sparse import (
    AttentionRecorder,
    SequenceParallelMesh,
    SequenceShards,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from sp_sparse.fidelity.arguments import parse_arguments as parse_fidelity
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.parallel import kv_exchange
from sp_sparse.parallel.auto_kv import AutoKVStrategy
from sp_sparse.parallel.kv_exchange import RingFacts, choose_kv_exchange
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.cases import seeded
from tests.oracle import block_rows, expand, masked_attention, relative_error
from tests.ranks import run_ranks

GIB = 2**30
GRID, HEADS, HEAD_DIM = VideoGrid(5, 7, 9), 5, 16
CONFIG = SparseAttentionConfig(
    backend="reference", schedule="constant", topk=0.25, block_size=(16, 8), keep_diagonal=False
)


def _facts(*rings: str, memory: int | None = 80 * GIB) -> RingFacts:
    """Each letter is the node of a rank."""
    return RingFacts(tuple(tuple(ring) for ring in rings), memory)


@pytest.mark.parametrize(
    ("facts", "shard_bytes", "name", "why"),
    [
        (_facts("aa"), 1, "ring", "two ranks both take as long .measured."),
        (_facts("ab"), 1, "ring", "two ranks both"),
        (_facts("aaaa"), 1, "ring", "within a node"),
        (_facts("aaaaaaaa"), 1, "ring", "within a node"),
        (_facts("aabb"), 1, "all_gather", "2 shards go between nodes instead of 3 hops"),
        (_facts("aaaabbbb", "aaaabbbb"), 1, "all_gather", "4 shards go between nodes instead of 7 hops"),
        (_facts("abcd"), 1, "ring", "a rank is alone on its node"),
        (_facts("aaab"), 1, "ring", "alone on its node"),
        # One ring of the mesh is enough: all of them do alike.
        (_facts("aabb", "aaab"), 1, "ring", "alone on its node"),
        (_facts("aaaa", "aabb"), 1, "all_gather", "2 shards go"),
        # Eight ranks hold nine shards instead of five, four five instead of four.
        (_facts("aabb"), int(1.5 * GIB), "all_gather", "2 shards"),
        (_facts("aabb"), int(1.7 * GIB), "ring", r"hold 1.7 GiB more than a ring, which is over 2% of .* 80.0 GiB"),
        (_facts("aaaabbbb"), int(0.39 * GIB), "all_gather", "4 shards"),
        (_facts("aaaabbbb"), int(0.41 * GIB), "ring", "hold 1.6 GiB more"),
        (_facts("aaaabbbb", memory=None), 100 * GIB, "all_gather", "4 shards"),
    ],
)
def test_the_choice(facts: RingFacts, shard_bytes: int, name: str, why: str) -> None:
    chosen = choose_kv_exchange(facts, shard_bytes, dense=False)
    assert chosen.name == name
    assert re.search(why, chosen.reason), chosen.reason
    assert choose_kv_exchange(facts, shard_bytes, dense=True).name == "ring"


# ------------------------------------------------------------------------------------------------------------- on ranks


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries and keys, each frame with a direction of its own."""
    generator, shape = seeded(0), (2, GRID.num_tokens, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    frame = torch.arange(GRID.num_tokens) // (GRID.height * GRID.width)
    direction = torch.randn(GRID.frames, HEADS, HEAD_DIM, generator=generator)
    return 1.5 * q + direction[frame], 1.5 * k + direction[(frame + 1) % GRID.frames], v


def _attend(config: SparseAttentionConfig, mesh: SequenceParallelMesh, equal: bool) -> tuple[Tensor, Tensor, Any]:
    """This rank's tokens of the output, its mask, and what the recorder tells of the exchange."""
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(config, mesh, num_heads=HEADS, head_dim=HEAD_DIM, recorder=recorder)
    shards = SequenceShards.equal(GRID.num_tokens, mesh.sequence_degree) if equal else layer.shards(GRID)
    first, last = shards.range_of(mesh.sequence_rank)
    padding = shards.lengths[mesh.sequence_rank] - (last - first)
    local = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding), value=torch.nan) for x in _inputs()]
    out = layer(*local, grid=GRID, shards=shards)[:, : last - first]
    start, stop = shards.grouped(mesh.ulysses_degree).realigned(layer.strategy.block).range_of(mesh.ring_rank)
    heads = layer.strategy.heads(HEADS)
    first_head = sum(heads[: mesh.ulysses_rank])
    told = recorder.summary()["kv_exchange"]
    rows = slice(first_head, first_head + heads[mesh.ulysses_rank]), block_rows(start, stop, config.block_size[0])
    mask = recorder.masks[-1][-1].to_dense()
    assert torch.equal(mask, _alone()[1][:, rows[0]][:, :, rows[1]])
    expected = _alone()[0][:, first:last]
    assert last == first or relative_error(out, expected) < 2e-6
    return out, mask, told


def _alone() -> tuple[Tensor, Tensor]:
    """One device: float64 under the expanded mask, and the mask."""
    recorder = AttentionRecorder(keep_masks=True)
    layer = SparseAttention(CONFIG, SequenceParallelMesh(), num_heads=HEADS, head_dim=HEAD_DIM, recorder=recorder)
    q, k, v = _inputs()
    layer(q, k, v, grid=GRID)
    assert recorder.summary()["kv_exchange"] == []
    mask = recorder.masks[-1][-1].to_dense()
    tokens = expand(mask, CONFIG.block_size, GRID.num_tokens, GRID.num_tokens)
    return masked_attention(q, k, v, tokens, HEAD_DIM**-0.5)[0], mask


def _check_auto(rank: int, ulysses: int, ring: int, node: int, name: str) -> None:
    os.environ["GROUP_RANK"] = str(rank // node)
    mesh = SequenceParallelMesh(ulysses, ring)
    for equal in (False, True):
        chosen, mask, told = _attend(replace(CONFIG, kv_exchange="auto"), mesh, equal)
        assert [(one["name"], one["calls"]) for one in told] == [(name, 1)]
        asked, asked_mask, as_asked = _attend(replace(CONFIG, kv_exchange=name), mesh, equal)
        assert as_asked == [{"name": name, "reason": "as asked", "calls": 1}]
        assert torch.equal(mask, asked_mask)
        assert torch.equal(chosen, asked), "the very exchange that it picks, bit for bit"


@pytest.mark.parametrize(
    ("ulysses", "ring", "node", "name"),
    [
        (1, 2, 1, "ring"),
        (1, 3, 3, "ring"),
        (1, 4, 4, "ring"),
        (1, 4, 2, "all_gather"),
        (1, 4, 3, "ring"),
        (2, 2, 2, "ring"),
        (2, 4, 4, "all_gather"),
        (2, 4, 2, "ring"),
        # Ulysses groups that cross nodes: the rings of a mesh lie differently over them, and do alike all the same.
        (2, 3, 3, "ring"),
        (1, 8, 4, "all_gather"),
        (1, 8, 8, "ring"),
    ],
)
def test_auto_is_what_it_picks_on_every_mesh(ulysses: int, ring: int, node: int, name: str) -> None:
    run_ranks(ulysses * ring, _check_auto, ulysses, ring, node, name)


def _check_agreement(rank: int) -> None:
    """Ranks whose own memory would have them choose differently, in sizes where just one of them is too small."""
    os.environ["GROUP_RANK"] = str(rank // 4)
    mesh = SequenceParallelMesh(2, 4, timeout=timedelta(seconds=20))  # else ranks that differ would wait long
    # 5 heads over 2 Ulysses ranks: 3 count, for all. 80 of the 315 tokens are the longest of 4 shards.
    shard = 2 * 2 * 80 * 3 * HEAD_DIM * 4
    for smallest, name in ((50.1, "all_gather"), (49.9, "ring")):
        own = int(shard * (smallest if rank == 5 else 1000))
        with mock.patch.object(kv_exchange, "_memory", return_value=own):
            told = _attend(CONFIG, mesh, equal=False)[2]
        assert [one["name"] for one in told] == [name], (rank, told)


def test_no_rank_chooses_by_what_it_alone_knows() -> None:
    run_ranks(8, _check_agreement)


def _check_sizes(rank: int) -> None:
    """Two layers, two sizes, dense and sparse steps: facts are gathered once, and each call has its own choice."""
    os.environ["GROUP_RANK"] = str(rank // 2)
    mesh, recorder = SequenceParallelMesh(1, 4), AttentionRecorder()
    config = replace(CONFIG, schedule="table", schedule_table=((1.0, 0.3, 0.3),), topk=0.3)
    gathered = mock.Mock(side_effect=RingFacts.gather)
    grids = VideoGrid(4, 8, 8), VideoGrid(8, 8, 8)
    shard = 2 * 64 * 2 * HEAD_DIM * 4
    with (
        mock.patch.object(RingFacts, "gather", gathered),
        mock.patch.object(kv_exchange, "_memory", return_value=int(50 * 1.5 * shard)),
    ):
        layers = [SparseAttention(config, mesh, num_heads=2, head_dim=HEAD_DIM, recorder=recorder)]
        layers.append(SparseAttention(config, mesh, num_heads=2, head_dim=HEAD_DIM, recorder=recorder, like=layers[0]))
        for layer in layers:
            for grid in grids:
                for step in range(3):
                    x = torch.randn(1, grid.num_tokens // 4, 2, HEAD_DIM, generator=seeded(rank))
                    layer(x, x, x, grid=grid, step=step, num_steps=3)
    assert gathered.call_count == 1
    told = {(one["name"], one["reason"].split()[0]): one["calls"] for one in recorder.summary()["kv_exchange"]}
    assert told == {("ring", "dense"): 4, ("all_gather", "2"): 4, ("ring", "gathered"): 4}
    recorder.clear()
    assert recorder.summary()["kv_exchange"] == []


def test_each_size_and_step_has_its_own_choice() -> None:
    run_ranks(4, _check_sizes)


def test_without_a_ring_nothing_is_chosen() -> None:
    layer = SparseAttention(CONFIG, SequenceParallelMesh(), num_heads=HEADS, head_dim=HEAD_DIM)
    assert isinstance(layer.strategy, AutoKVStrategy)
    assert layer.kv_exchange(_inputs()[0], layer.shards(GRID)) is None


# ------------------------------------------------------------------------------------------------------------- commands

SPARSE = ("--model", "tiny", "--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3")


def _check_command(rank: int, folder: str) -> None:
    from sp_sparse.generate.__main__ import main

    os.environ["GROUP_RANK"] = str(rank // 2)
    size = ["--height", "64", "--width", "64", "--num-frames", "9", "--num-inference-steps", "2"]
    flags = [*SPARSE, "--sparse-attn-schedule", "constant", "--sparse-attn-dense-steps", "1", "--ring-degree", "4"]
    assert main([*flags, *size, "--output", f"{folder}/video.mp4"]) == 0


def test_generate_tells_what_was_chosen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    run_ranks(4, _check_command, str(tmp_path))
    report = json.loads((tmp_path / "video.json").read_text())
    told = {one["name"]: one for one in report["attention"]["kv_exchange"]}
    assert set(told) == {"ring", "all_gather"}
    assert told["ring"]["reason"].startswith("dense attention hides")
    assert told["all_gather"]["reason"].startswith("2 shards go between nodes")
    assert sum(one["calls"] for one in told.values()) == sum(report["attention"]["calls"].values())
    assert report["arguments"]["sparse"]["kv_exchange"] == "auto"
    assert "keys and values: ring x" in capfd.readouterr().err


@pytest.mark.parametrize("exchange", ["auto", "ring", "all_gather"])
def test_every_command_takes_the_flag(exchange: str, tmp_path: Path) -> None:
    flags = ["--ring-degree", "2", "--sparse-attn-kv-exchange", exchange]
    assert parse_arguments([*SPARSE, *flags]).sparse.kv_exchange == exchange
    assert parse_serve_arguments([*SPARSE, *flags]).sparse.kv_exchange == exchange
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    fidelity = parse_fidelity(["--model", "tiny", "--prompts", str(prompts), "--output", str(tmp_path), *flags])
    assert fidelity.base().sparse.kv_exchange == exchange
    assert fidelity.config(fidelity.settings[0]).kv_exchange == exchange
    assert SparseAttentionConfig.from_mapping({"kv_exchange": exchange}).kv_exchange == exchange


def test_auto_without_a_ring_is_taken() -> None:
    assert parse_arguments([*SPARSE, "--sparse-attn-kv-exchange", "auto"]).ring_degree == 1
    with pytest.raises(ValueError, match="kv_exchange='tree' is not known; use one of auto, ring, all_gather"):
        SparseAttentionConfig(kv_exchange="tree")
