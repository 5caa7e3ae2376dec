"""The invariant on GPUs: full-width shapes over NCCL, and no host-device synchronisation in the layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sp_sparse import SequenceParallelMesh, SparseAttention, SparseAttentionConfig, VideoGrid
from sp_sparse.config import KV_EXCHANGES
from sp_sparse.kernels.registry import load_kernel

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
