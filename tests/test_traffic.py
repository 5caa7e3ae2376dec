"""Pruned keys, a prototype: outputs are those of one device, nothing is sent that no mask chooses, what is told is so."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from launch.prototypes import pruned_model, traffic
from launch.prototypes.pruned_keys import Aside, PrunedKVStrategy, pruned_keys
from launch.prototypes.traffic import (
    EXCHANGES,
    Case,
    TrafficArguments,
    band_mask,
    main,
    median_place,
    needed_share,
    random_mask,
    stretched,
)
from sp_sparse import BlockMask, SequenceParallelMesh, SequenceShards
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.recorded_masks import RecordedMasks
from sp_sparse.kernels.base import Kernel
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.mask import num_blocks
from tests.cases import poisoned, random_blocks, random_tensors
from tests.oracle import expand, masked_attention, relative_error
from tests.ranks import run_ranks, world_group

CPU = torch.device("cpu")
BLOCK = (8, 4)
ARGUMENTS = TrafficArguments(
    tokens=(200,), heads=3, head_dim=8, block=8, masks=("random", "band"), densities=(0.3,), exchanges=EXCHANGES,
    backend="reference", dtype="float32", device="cpu", warmup=0, repeat=1, output=None, timeout_s=60.0,
)  # fmt: skip


def _attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Any:
    assert mask is not None
    return kernel(query, key, value, mask, 0.3)


def _check_pruned(rank: int, ranks: int) -> None:
    """Uninitialised memory is NaN, so that a block that is attended and was not sent shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    mesh, kernel = SequenceParallelMesh(1, ranks), ReferenceKernel()
    cuts = [(32,) * (ranks - 1) + (21,), (8, 40, 0, 16)[:ranks] if ranks < 5 else (8, 0, 40, 16, 0, 8, 24, 3)[:ranks]]
    for number, lengths in enumerate(cuts):
        shards = SequenceShards(lengths)
        tokens, (first, last) = shards.sequence_length, shards.range_of(rank)
        blocks = random_blocks((2, 3, num_blocks(tokens, BLOCK[0]), num_blocks(tokens, BLOCK[1])), number, 0.12)
        mask = poisoned(BlockMask.from_dense(blocks, BLOCK, tokens, tokens), 1)
        query, key, value = random_tensors(2, tokens, tokens, 3, 8, number, torch.float64)
        strategy = PrunedKVStrategy(mesh, BLOCK[0], aside=Aside(CPU))
        rows = mask.query_rows(first // BLOCK[0], num_blocks(last, BLOCK[0]))
        for _ in range(2):
            q, k, v = (x[:, first:last] for x in (query, key, value))
            out, lse = strategy.attend(partial(_attend, kernel), q, k, v, rows, shards)
            one, one_lse = kernel(query, key, value, mask, 0.3)
            expected, _ = masked_attention(query, key, value, expand(blocks, BLOCK, tokens, tokens), 0.3)
            assert lse is not None
            assert one_lse is not None
            assert torch.allclose(lse, one_lse[..., first:last], atol=1e-12)
            if last > first:
                assert relative_error(out, one[:, first:last]) < 1e-13
                assert relative_error(out, expected[:, first:last]) < 1e-13
    with pytest.raises(ValueError, match="dense attention chooses every key block"):
        strategy.parts(key, value, None, shards, world_group())


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_pruned_keys_give_what_one_device_gives(ranks: int) -> None:
    run_ranks(ranks, _check_pruned, ranks)


def _check_bytes(rank: int, ranks: int) -> None:
    """What goes into collectives, but to this rank itself, is what `bytes_sent` tells."""
    mesh, place = SequenceParallelMesh(1, ranks), Ranks(rank, ranks, CPU)
    sent = 0
    all_to_all, send = dist.all_to_all_single, dist.P2POp

    def counted(
        out: Tensor, given: Tensor, takes: list[int] | None = None, gives: list[int] | None = None, **group: Any
    ) -> object:
        nonlocal sent
        parts = given.split(gives if gives is not None else given.shape[0] // ranks)
        sent += sum(part.nbytes for peer, part in enumerate(parts) if peer != rank)
        return all_to_all(out, given, takes, gives, **group)

    def counted_send(operation: Any, tensor: Tensor, *others: Any) -> dist.P2POp:
        nonlocal sent
        sent += tensor.nbytes * (operation is dist.isend)
        return send(operation, tensor, *others)

    for name, dense in traffic.masks(ARGUMENTS, 200, place):
        case = Case(ARGUMENTS, mesh, place, name, dense, 200)
        for exchange in EXCHANGES:
            sent = 0
            with mock.patch.object(dist, "all_to_all_single", counted), mock.patch.object(dist, "P2POp", counted_send):
                case.whole(case.strategy(exchange, Aside(CPU)))
            most = max(place.gather(sent))
            # The last block is short: it is sent as if it were whole.
            assert most == case.bytes_sent(exchange), (name, exchange)
            row = case.measure(exchange, Aside(CPU))
            assert row["error"] < 1e-6
            assert row["bytes_sent"] == most
            assert (row["ms_lists"] is None) == (exchange != "pruned")
            assert (row["exchange"], row["mask"], row["sequence"], row["gpus"]) == (exchange, name, 200, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_those_that_go(ranks: int) -> None:
    run_ranks(ranks, _check_bytes, ranks)


def _check_command(rank: int, output: str) -> None:
    flags = [
        "--tokens",
        "150",
        "--heads",
        "3",
        "--head-dim",
        "8",
        "--block",
        "8",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    assert main([*flags, "--repeat", "1", "--warmup", "0", "--densities", "0.2", "--output", output]) == 0
    with mock.patch.object(traffic, "_relative_error", return_value=0.1):
        assert main([*flags, "--repeat", "1", "--warmup", "0", "--masks", "band", "--output", output + ".wrong"]) == 1


def test_the_command_writes_a_line_an_exchange_and_fails_where_an_output_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "traffic.jsonl"
    run_ranks(2, _check_command, str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    masks = ("random", "band", "mini_0.3", "mini_0.1")
    assert [(row["mask"], row["exchange"]) for row in rows] == [(m, e) for m in masks for e in EXCHANGES]
    assert all(row["error"] < 1e-6 for row in rows)


def test_one_rank_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 2
    assert "start 2 or more" in capsys.readouterr().err


def test_masks_are_as_dense_as_asked() -> None:
    for make in (random_mask, band_mask):
        assert (make(3, 20, 6).sum(-1) == 6).all()
    band = band_mask(2, 20, 6)[0, 1]
    assert band.diagonal().all()
    assert band[0, :6].all()
    assert not torch.equal(random_mask(3, 20, 6)[0, 0], random_mask(3, 20, 6)[0, 1])
    coarse = np.array([[[1, 0], [1, 1]], [[0, 1], [0, 0]]], dtype=np.bool_)
    fine = stretched(coarse, 4, 3)[0]
    assert fine.shape == (3, 4, 4)
    assert torch.equal(fine[0], torch.tensor([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2, dtype=torch.bool))
    assert torch.equal(fine[0], fine[2])


def test_needed_share() -> None:
    dense = torch.eye(8, dtype=torch.bool).expand(1, 2, 8, 8).clone()
    assert needed_share(dense, 2) == 0
    dense[0, 0, 0, 4] = dense[0, 0, 1, 4] = True  # one block of the other four, of one head of two, of one rank of two
    assert needed_share(dense, 2) == pytest.approx(1 / 16)
    assert needed_share(dense, 8) == pytest.approx(2 / (8 * 2 * 7))


def test_the_recorded_mask_is_the_median_one() -> None:
    masks = np.zeros((3, 1, 8, 8), dtype=np.bool_)
    for number, count in enumerate((4, 0, 2)):
        masks[number, 0, 0, 4 : 4 + count] = True
    recorded = RecordedMasks(tuple((0, n, 0) for n in range(3)), np.packbits(masks, axis=-1), (16, 16), 128, {})
    assert median_place(recorded, 2).sum() == 2


def test_the_model_of_it_prints_a_line_a_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = band_mask(2, 64, 8).numpy()[None, 0]
    recorded = RecordedMasks(((0, 0, 0),), np.packbits(masks, axis=-1), (16, 16), 1024, {})
    recorded.save(tmp_path / "band.npz")
    assert pruned_model.main(["--masks", str(tmp_path / "band.npz"), "--tokens", "32768", "--rings", "2", "4"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "slow, 15 GB/s" in head
    # Of the others' 32 blocks a shard of two needs 4 or 3 at its edge, one of four 4 + 3 of 48 where it has two edges.
    assert [line.split(" | ")[3] for line in lines] == ["11%, 11% to 11%", "11%, 11% to 11%"]
    for line in lines:
        ring, _, pruned, _ = map(float, line.rstrip(" |").split(" | ")[-1].split(" · "))
        assert pruned < ring


def _check_delayed(rank: int, ranks: int, store: str) -> None:
    """Random delays before and amid calls; memory that buffers come from is poisoned, and taken again at once."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, device_id=device)
    delays, aside, group = random.Random(rank), Aside(device), world_group()
    shards = SequenceShards.aligned(4096 * ranks - 40, 128, 1, ranks)
    tokens, (first, last) = shards.sequence_length, shards.range_of(rank)
    blocks = num_blocks(tokens, 128)
    dense = torch.rand(1, 8, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.04
    whole = BlockMask.from_dense(dense.to(device), (128, 128), tokens, tokens)
    mask = whole.query_rows(first // 128, num_blocks(last, 128))
    wanted = dense[:, :, first // 128 : num_blocks(last, 128)].any(2).repeat_interleave(128, 2)[..., :tokens]
    wanted = wanted.transpose(1, 2).unsqueeze(-1).to(device)
    wanted[:, first:last] = False
    values = (
        torch.arange(tokens, device=device).view(1, -1, 1, 1) + torch.arange(8, device=device).view(1, 1, -1, 1) / 8
    )
    values = values.expand(1, tokens, 8, 128).contiguous()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(20):
        poison = torch.full((4, *values.shape), math.nan, device=device)
        del poison
        key = torch.full((1, last - first, 8, 128), math.nan, device=device)
        torch.cuda._sleep(delays.randrange(20_000_000))
        key.copy_(values[:, first:last])  # as a projection that is not done when the exchange is queued
        for part, (k, v, _) in enumerate(pruned_keys(key, key + 0.5, mask, shards.edges, group, aside)):
            if part:
                wrong += ((k != values) & wanted).sum() + ((v != values + 0.5) & wanted).sum()
            torch.cuda._sleep(delays.randrange(20_000_000))
            del k, v
        del key
        reused = torch.full((4, *values.shape), -1.0, device=device)
        torch.cuda._sleep(1_000_000)
        wrong += (reused != -1).sum()
        del reused
    assert wanted.any()
    assert wrong.item() == 0
    dist.destroy_process_group()


@pytest.mark.multigpu
def test_pruned_keys_wait_for_what_they_need(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    mp.spawn(_check_delayed, (ranks, str(tmp_path / "store")), nprocs=ranks)
