"""`--quantization fp8`: weights and activations of the blocks' linear layers in float8, by torchao.

Each row of a weight and each token of an input has its own scale (`PerRow`), so that a token is rounded alike whichever rank
has it. Everything else keeps its dtype: embeddings, norms, modulation, attention itself and the output projection.
"""

from __future__ import annotations

import torch
from torch import nn

# Ada, Hopper and later have float8 matrix products.
_CAPABILITY = (8, 9)
_MULTIPLE = 16


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to quantize where it cannot be computed.

    Raises:
        ValueError: no torchao, no GPU with float8, or weights that are not bfloat16.
    """
    remedy = "leave --quantization out"
    try:
        import sp_sparse.generate.float8  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'--quantization fp8 needs torchao, and a torch that it knows ({error}); pip install "sp-sparse[fp8]", or '
            f"{remedy}"
        ) from error
    check_hardware(device, remedy)
    if dtype is not torch.bfloat16:
        raise ValueError(
            f"--quantization fp8 scales rows of bfloat16, and the transformers are in {str(dtype).removeprefix('torch.')}; "
            f"use --dtype bfloat16, or {remedy}"
        )


def check_hardware(device: torch.device, remedy: str) -> None:
    """Refuse a device without float8 matrix products, with `remedy`.

    Raises:
        ValueError: a CPU, or an older GPU.
    """
    wanted = ".".join(map(str, _CAPABILITY))
    if device.type != "cuda":
        raise ValueError(
            f"--quantization fp8 needs a GPU of compute capability {wanted} or higher, and this job runs on a "
            f"{device.type.upper()}; {remedy}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        raise ValueError(
            f"--quantization fp8 needs a GPU of compute capability {wanted} or higher, and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}; {remedy}"
        )


@torch.no_grad()
def quantize_block(block: nn.Module) -> None:
    """Quantize the linear layers of a block in place.

    Raises:
        ValueError: a layer whose sides are not multiples of 16, which has no float8 product.
    """
    from sp_sparse.generate.float8 import Float8Linear

    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            raise ValueError(
                f"--quantization fp8 needs layers whose sides are multiples of {_MULTIPLE}, and {name} is "
                f"{layer.in_features} x {layer.out_features}; leave --quantization out"
            )
        block.set_submodule(name, Float8Linear(layer))
