"""Bringing a transformer's weights to their place one block at a time, so that nowhere a whole one is held beside it.

Weights come as they lie in their files, mapped: of pages that all ranks of a machine share, and that go again when memory
is short. A block is moved to the device, takes in its LoRA weights if it is to be quantized, is cast, quantized, and dealt
out; then comes the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sp_sparse.generate.arguments import STAND_INS, GenerateArguments
from sp_sparse.generate.fsdp import check_fsdp, shard_block, shard_model, world_mesh
from sp_sparse.generate.quantize import check_fp8, quantize_block
from sp_sparse.integrations.diffusers.sharded import blocks_of


@dataclass(frozen=True)
class Placement:
    """Where the weights of the transformers go, and as what.

    Attributes:
        device: of this rank.
        dtype: of the weights that are not quantized.
        quantized: whether linear layers of the blocks become float8.
        mesh: the ranks over which blocks are dealt out; None leaves them whole.
    """

    device: torch.device
    dtype: torch.dtype
    quantized: bool
    mesh: Any | None

    def place(self, transformer: Any) -> None:
        """Bring a whole transformer from the CPU to its place."""
        for block in blocks_of(transformer):
            self.place_block(block, transformer)
        self.finish(transformer)

    def place_block(self, block: nn.Module, transformer: Any) -> None:
        """Bring one of its blocks, which need not be among `transformer.blocks` yet, to its place."""
        self._move(block, transformer)
        if self.quantized:
            quantize_block(block)
        if self.mesh is not None:
            shard_block(block, self.mesh)

    def finish(self, transformer: Any) -> None:
        """Bring what is beside the blocks to its place; all of them are there."""
        for name, part in transformer.named_children():
            if name not in ("blocks", "vace_blocks"):
                self._move(part, transformer)
        self._cast(transformer.named_parameters(recurse=False), transformer)
        if self.quantized and getattr(transformer, "peft_config", None):
            transformer.unload_lora()  # its weights are in the others by now
        if self.mesh is not None:
            shard_model(transformer, blocks_of(transformer), self.mesh, whole=True)

    def place_text_encoder(self, encoder: Any) -> None:
        """Bring the text encoder to its place."""
        encoder.to(self.device)
        if self.mesh is None:
            return
        blocks = list(encoder.encoder.block)
        for block in blocks:
            shard_block(block, self.mesh)
        shard_model(encoder, blocks, self.mesh, whole=False)

    def _move(self, module: nn.Module, transformer: Any) -> None:
        module.to(self.device)
        if self.quantized:
            _fuse_lora(module)
        self._cast(module.named_parameters(), transformer)

    def _cast(self, weights: Iterable[tuple[str, nn.Parameter]], transformer: Any) -> None:
        for name, weight in weights:
            # As from_pretrained does: these stay in float32 whatever the dtype.
            kept = any(part in (transformer._keep_in_fp32_modules or ()) for part in name.split("."))
            weight.data = weight.to(self.device, torch.float32 if kept else self.dtype)


def check_placement(arguments: GenerateArguments, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot be placed as asked, before weights are read; `dtype` is that of the model by default.

    Raises:
        ValueError: with the remedy.
    """
    if arguments.fsdp:
        check_fsdp(arguments)
    if arguments.quantization == "fp8":
        check_fp8(device, wanted_dtype(arguments, dtype))
    for flag, given in (("--fsdp", arguments.fsdp), ("--quantization fp8", arguments.quantization == "fp8")):
        if given and arguments.model in STAND_INS and (arguments.lora or arguments.lora_2):
            raise ValueError(
                f"{flag} places the blocks of {arguments.model} as they are drawn, before --lora could change them; leave "
                f"out one of them"
            )


def placement_of(arguments: GenerateArguments, device: torch.device, dtype: torch.dtype) -> Placement | None:
    """What the arguments ask for; None where each component is loaded to the device as it is."""
    quantized = arguments.quantization == "fp8"
    if not (quantized or arguments.fsdp):
        return None
    return Placement(device, dtype, quantized, world_mesh(device) if arguments.fsdp else None)


def wanted_dtype(arguments: GenerateArguments, default: torch.dtype) -> torch.dtype:
    """Of the transformers."""
    if arguments.dtype == "auto":
        return default
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    return dtype


def _fuse_lora(module: nn.Module) -> None:
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    if layers:
        recurse_remove_peft_layers(module)
