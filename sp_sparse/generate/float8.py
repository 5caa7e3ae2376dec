"""A linear layer in float8, by torchao. Imported where layers are quantized alone, for it needs torchao."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

# As Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) has it.
_SUMS, _INPUTS = Float8MMConfig(use_fast_accum=True), QuantizeTensorToFloat8Kwargs(granularity=PerRow())


class Float8Linear(nn.Module):
    """`nn.Linear` whose weights and inputs are rounded to float8 (e4m3), each row of them at its own scale.

    torchao's own tensor would be the weight, but neither FSDP2 nor diffusers' offloading takes it apart: here both of its
    parts are parameters.

    Attributes:
        values: float8 `[out, in]`.
        scale: float32 `[out, 1]`; times the values it is the weight.
        bias: as it was.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """`linear` is in bfloat16, and its sides are multiples of 16."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = Float8Tensor.from_hp(linear.weight.detach(), granularity=PerRow(), mm_config=_SUMS)
        self.values = nn.Parameter(weight.qdata, requires_grad=False)
        self.scale = nn.Parameter(weight.scale, requires_grad=False)
        self.bias = linear.bias
        self._dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """As a tensor of the dtype that it had."""
        return _weight(self.values, self.scale, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.values, self.scale, self.bias)


@torch.compiler.allow_in_graph  # the compiler cannot trace how a Float8Tensor is made, but what is computed with it
def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _weight(values, scale, x.dtype), bias)


def _weight(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    weight: Tensor = Float8Tensor(
        values,
        scale,
        block_size=[1, values.shape[1]],
        mm_config=_SUMS,
        act_quant_kwargs=_INPUTS,
        dtype=dtype,
    )
    return weight
