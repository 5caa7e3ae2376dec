"""The invariant on GPUs: full-width shapes over NCCL, and no host-device synchronisation in the layer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sp_sparse import SequenceParallelMesh, SparseAttention, SparseAttentionConfig, VideoGrid
from sp_sparse.config import KV_EXCHANGES
from sp_sparse.kernels.registry import load_kernel
from sp_sparse.parallel.ring import ring_hops
from sp_sparse.parallel.streams import SideStream
from tests.ranks import world_group

ROOT = Path(__file__).resolve().parent.parent


def _check(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "launch/check_invariant.py", "--repeat", "0", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.multigpu
@pytest.mark.parametrize("exchange", KV_EXCHANGES)
@pytest.mark.parametrize("backend", ["fa4", "triton", "flashinfer"])
def test_two_gpus_equal_one(backend: str, exchange: str) -> None:
    """Ulysses and ring, at full width and at a size whose shards are ragged."""
    reason = load_kernel(backend).missing()
    if reason is not None:
        pytest.skip(reason)
    _check("--backend", backend, "--kv-exchange", exchange, "--grids", "21x30x52", "5x17x31", "--topk", "0.3", "0.1")


@pytest.mark.multigpu
def test_two_gpus_equal_one_at_720p() -> None:
    _check("--grids", "21x45x80", "--topk", "0.3")


@pytest.mark.multigpu
def test_two_gpus_equal_one_with_odd_sizes() -> None:
    _check("--grids", "21x30x52", "7x19x23", "--heads", "7", "--head-dim", "64", "--block-size", "64")


def _check_delayed_ring(rank: int, ranks: int, store: str) -> None:
    """Random delays before exchanges and while shards are attended; memory that buffers come from is poisoned."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, device_id=device)
    delays, side = random.Random(rank), SideStream(device)
    tokens = [1024 + 128 * (i % 3) for i in range(ranks)]
    key, value = (torch.full((1, tokens[rank], 8, 128), rank + part, device=device) for part in (0.25, 0.5))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(20):
        poison = torch.full((ranks, 2, max(tokens) * 8 * 128), float("nan"), device=device)
        del poison
        with side.run():
            torch.cuda._sleep(delays.randrange(20_000_000))
        for owner, k, v in ring_hops(key, value, tokens, world_group(), side):
            torch.cuda._sleep(delays.randrange(20_000_000))
            wrong += (k != owner + 0.25).sum() + (v != owner + 0.5).sum()
        # Takes the buffers' memory while exchanges that were not waited for would still write to it.
        reused = torch.full((ranks, 2, max(tokens) * 8 * 128), -1.0, device=device)
        torch.cuda._sleep(1_000_000)
        wrong += (reused != -1).sum()
        del reused
    assert wrong.item() == 0
    dist.destroy_process_group()


@pytest.mark.multigpu
def test_ring_waits_for_shards_and_buffers(tmp_path: Path) -> None:
    """On all GPUs: with more than three, buffers are filled anew while others are attended."""
    ranks = torch.cuda.device_count()
    mp.spawn(_check_delayed_ring, (ranks, str(tmp_path / "store")), nprocs=ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", ["topk", "subblock", "window"])
def test_layer_never_synchronises(selector: str) -> None:
    config = SparseAttentionConfig(
        backend="auto", schedule="constant", topk=0.3, selector=selector, window=1, keep_first_frame=True
    )
    attention = SparseAttention(config, SequenceParallelMesh(), num_heads=4, head_dim=128)
    grid = VideoGrid(5, 17, 31)
    q, k, v = (torch.randn(1, grid.num_tokens, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attention(q, k, v, grid=grid)  # compiles the kernels and plans the shape
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(q, k, v, grid=grid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("selector", ["topk", "subblock"])
def test_masks_match_the_cpu_and_auto_is_no_reference(selector: str) -> None:
    """Summaries and scores are exact, so a GPU selects the very blocks that a CPU does."""
    from sp_sparse import AttentionRecorder

    config = SparseAttentionConfig(
        backend="auto", schedule="constant", topk=0.2, block_size=(128, 64), selector=selector
    )
    grid = VideoGrid(5, 17, 31)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, grid.num_tokens, 3, 64, generator=generator).to(torch.bfloat16) for _ in range(3)]
    outs, masks = [], []
    for device in ("cpu", "cuda"):
        recorder = AttentionRecorder(keep_masks=True)
        attention = SparseAttention(config, SequenceParallelMesh(), num_heads=3, head_dim=64, recorder=recorder)
        outs.append(attention(*(x.to(device) for x in tensors), grid=grid).cpu().float())
        masks.append(recorder.masks[0][-1].to_dense().cpu())
        (kernel,) = recorder.summary()["calls"]
        assert (kernel == "reference") == (device == "cpu")
    assert torch.equal(masks[0], masks[1])
    assert (outs[0] - outs[1]).abs().max() < 2e-2
