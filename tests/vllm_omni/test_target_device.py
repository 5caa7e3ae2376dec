"""vllm-omni builds its models under the target device as the default one; what a layer makes then must not wait for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout

from sp_sparse.integrations.vllm_omni import self_attention
from sp_sparse.integrations.vllm_omni.backend import SparseAttentionImpl

GRID, HEADS, HEAD_DIM = (4, 8, 16), 4, 64
OPTIONS: list[dict[str, Any]] = [
    {"selector": "topk"},
    {"selector": "subblock"},
    {"selector": "window"},
    {"remainder": "linear"},
    {"preset": "fast", "num_steps": 4, "schedule": "constant"},
]


def _layer(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], device: str) -> SparseAttentionImpl:
    """A layer that vllm-omni builds with these options, under a default device on which it must not read."""
    backend = "reference" if device == "cpu" else "triton"
    config = SimpleNamespace(
        additional_config={"sp_sparse": {"backend": backend, "block_size": 64, **options}},
        parallel_config=None,
        dtype=torch.bfloat16,
    )
    monkeypatch.setattr(self_attention, "get_current_diffusion_config_or_none", lambda: config)
    monkeypatch.setattr(self_attention, "current_omni_platform", SimpleNamespace(device_type=device))
    with torch.device("meta" if device == "cpu" else device):
        return SparseAttentionImpl(
            HEADS, HEAD_DIM, HEAD_DIM**-0.5, num_kv_heads=HEADS, prefix="blocks.1.attn1", qkv_layout="BSND"
        )


def _call(layer: SparseAttentionImpl, device: str) -> tuple[Any, tuple[Tensor, Tensor, Tensor, AttentionMetadata]]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 512, HEADS, HEAD_DIM).to(device, torch.bfloat16)
    return layer.forward_cuda, (query, key, value, AttentionMetadata(video_layout=VideoTokenLayout(latent_grid=GRID)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_made_on_the_default_device(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    layer = _layer(monkeypatch, options, "cpu")
    forward, arguments = _call(layer, "cpu")
    eager = forward(*arguments)
    assert eager.isfinite().all()
    assert torch.equal(torch.compile(forward, backend="eager", fullgraph=True)(*arguments), eager)
    assert layer.sparse is not None
    assert (layer.sparse.sparse_calls, layer.sparse.dense_calls) == (2, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_layer_does_not_wait(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    forward, arguments = _call(_layer(monkeypatch, options, "cuda"), "cuda")
    compiled = torch.compile(forward, fullgraph=True)
    expected = compiled(*arguments)  # compiles, and makes the plans of always-kept blocks
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = compiled(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, expected)
