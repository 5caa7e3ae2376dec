"""A checkpoint folder goes straight to its place: what its weights become there, and what is held on the way."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from sp_sparse.generate import random_models
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.models import find_model, load_pipeline, transformers_of
from sp_sparse.generate.placement import Placement
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _save(folder: Path, dtype: torch.dtype, ffn_dim: int = 64, layers: int = 2) -> None:
    pipe = random_models.tiny_text_to_video(dtype)
    config = {**random_models._TINY, "ffn_dim": ffn_dim, "num_layers": layers}
    experts = random_models._experts(dtype, num_attention_heads=8, in_channels=16, out_channels=16, **config)
    pipe.register_modules(**experts)
    pipe.save_pretrained(folder)


def _weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor
        for number, transformer in enumerate(transformers_of(pipe))
        for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers())
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_placed_is_what_would_be_loaded(
    stored: torch.dtype, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, stored)
    arguments = GenerateArguments(model=str(tmp_path), dtype=dtype)
    model = find_model(arguments, CPU)
    whole = load_pipeline(arguments, model, CPU)
    placement = Placement(CPU, getattr(torch, dtype), False, None)
    monkeypatch.setattr("sp_sparse.generate.models.placement_of", lambda *_: placement)
    placed = load_pipeline(arguments, model, CPU)
    expected, found = _weights(whole), _weights(placed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, getattr(torch, dtype)}
    for part in ("vae", "text_encoder"):
        for (name, tensor), other in zip(
            getattr(whole, part).named_parameters(), getattr(placed, part).parameters(), strict=True
        ):
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name


def test_random_weights_are_the_same_however_they_are_placed() -> None:
    narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 64}
    placement = Placement(CPU, torch.float32, False, None)
    whole = random_models.random_a14b(3, CPU, torch.float32, None, **narrow)
    placed = random_models.random_a14b(3, CPU, torch.float32, placement, **narrow)
    assert len(whole.transformer.blocks) == whole.transformer.config.num_layers == 3
    expected, found = _weights(whole), _weights(placed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    blocks = [block.ffn.net[2].weight for block in (*whole.transformer.blocks, *whole.transformer_2.blocks)]
    assert not any(torch.equal(one, other) for one, other in zip(blocks, blocks[1:], strict=False))


def _memory(what: str) -> int:
    """`RssAnon`: bytes that are this process's own, not a file's; `VmHWM`: the most that was resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def _in_another_process(function: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def _check_whole(arguments: GenerateArguments, size: int) -> None:
    torch.set_num_threads(1)
    before = _memory("VmHWM")
    pipe = load_pipeline(arguments, find_model(arguments, CPU), CPU)
    assert sum(tensor.sum().isfinite().item() for tensor in _weights(pipe).values())  # all pages are read
    assert _memory("VmHWM") - before < 1.5 * size


def _check_dealt_out(rank: int, arguments: GenerateArguments, size: int) -> None:
    model, own = find_model(arguments, CPU), []
    whole_block = Placement.place_block

    def watched(self: Placement, block: nn.Module, transformer: Any) -> None:
        whole_block(self, block, transformer)
        own.append(_memory("RssAnon"))

    Placement.place_block = watched  # type: ignore[method-assign]
    highest, start = _memory("VmHWM"), _memory("RssAnon")
    load_pipeline(arguments, model, CPU)
    # Of its own a rank has half of what is half as wide, and a block beside it; the rest are pages that ranks share.
    assert len(own) == 16
    assert max(own) - start < (1 / 4 + 1 / 8) * size
    assert _memory("VmHWM") - highest < 1.75 * size


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_folder_is_not_held_twice(tmp_path: Path) -> None:
    folder, small = tmp_path / "model", tmp_path / "small"
    _save(small, torch.float32)
    arguments = GenerateArguments(model=str(small))
    load_pipeline(arguments, find_model(arguments, CPU), CPU)  # what is imported on the way is none of the weights
    # Another process makes it, so that none of its memory is left here to be used again.
    _in_another_process(_save, folder, torch.float32, 4096, 8)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert size > 60 << 20
    arguments = replace(arguments, model=str(folder))
    _in_another_process(_check_whole, arguments, size)
    sparse = replace(arguments.sparse, backend="reference", block_size=(16, 16))
    dealt_out = replace(arguments, fsdp=True, ulysses_degree=2, sparse=sparse, dtype="bfloat16")
    run_ranks(2, _check_dealt_out, dealt_out, size)
