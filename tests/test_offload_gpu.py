"""`--offload` on a GPU: page-locked memory, streams, and the same latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sp_sparse import AttentionRecorder
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.asked import fill_defaults
from sp_sparse.generate.attach import attach, build_mesh
from sp_sparse.generate.models import find_model, load_pipeline
from sp_sparse.generate.stages import StepClock
from sp_sparse.generate.start import Start
from sp_sparse.generate.video import denoise, encode_prompt

SMALL = ["--model", "tiny", "--height", "64", "--width", "64", "--num-frames", "5"]
SMALL += ["--num-inference-steps", "4"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]


def _videos(kind: str, *flags: str) -> tuple[Any, list[Tensor]]:
    """The pipeline, and the latents of two videos after one another."""
    cuda = torch.device("cuda")
    arguments = parse_arguments([*SMALL, *SPARSE, "--offload", kind, *flags])
    model = find_model(arguments, cuda)
    arguments = fill_defaults(arguments, model)
    pipe = load_pipeline(arguments, model, cuda)
    pipe.set_progress_bar_config(disable=True)
    prompt = encode_prompt(pipe, arguments, "a cat", cuda)
    attach(pipe, arguments.sparse, build_mesh(arguments), AttentionRecorder())
    start = Start.of(arguments, model)
    return pipe, [denoise(pipe, arguments, prompt, StepClock(cuda), start) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny", "tiny-2.1-i2v", "tiny-vace"])
@pytest.mark.parametrize("kind", ["idle", "layers"])
def test_weights_wait_page_locked_and_the_videos_are_the_same(kind: str, model: str) -> None:
    _, plain = _videos("none", "--model", model)
    pipe, latents = _videos(kind, "--model", model)
    for made, wanted in zip(latents, plain, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert latents[0].device == pipe.vae.device == pipe.device
    for name in ("text_encoder", "image_encoder", "transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        for weight in () if module is None else (*module.parameters(), *module.buffers()):
            assert weight.device.type == "cpu"
            assert weight.is_pinned()


@pytest.mark.gpu
def test_an_expert_comes_without_waiting_for_the_device() -> None:
    """What is under way on the device goes on while the host asks for the other expert."""
    pipe, _ = _videos("idle")
    part = pipe.transformer._hf_hook
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        part.turns.take(part)
        part.turns.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
