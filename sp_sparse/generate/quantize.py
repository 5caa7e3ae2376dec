"""`--quantization fp8`: weights and activations of the blocks' linear layers in float8, by torchao.

Each row of a weight and each token of an input has its own scale (`PerRow`). Everything else keeps its dtype: embeddings,
norms, modulation, attention itself and the output projection.
"""

from __future__ import annotations

import importlib.util

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
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f'--quantization fp8 needs torchao; pip install "sp-sparse[fp8]", or {remedy}')
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
        ValueError: a layer whose sides are not multiples of 16, which torchao would leave as it is.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE):
            raise ValueError(
                f"--quantization fp8 needs layers whose sides are multiples of {_MULTIPLE}, and {name} is "
                f"{layer.in_features} x {layer.out_features}; leave --quantization out"
            )
    # Without torchao's settings of the compiler, which would be those of the whole process.
    quantize_(block, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
