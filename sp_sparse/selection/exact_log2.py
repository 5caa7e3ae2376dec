"""Powers and logarithms of base 2 that have the same bits everywhere.

A library's exp differs between devices, and on CPUs between the body of a vector and its tail. Here both are polynomials of
fp32 products and sums, each rounded once as IEEE 754 says, so that nothing but the argument decides. The Triton code is the
same (selection/triton_subblock.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# 2^f = 1 + f + f (f - 1) r(f) for f in [0, 1), to 1.3e-7; both ends are exact. Minimax, lowest power first.
EXP2 = (0.3068470198909911, 0.06669989671651322, 0.01084460062672948, 0.001896849781825232)

# log2(1 + f) = f + f (1 - f) r(f), likewise, to 3.3e-7.
LOG2 = (
    0.4426664394336746,
    -0.2778877845992972,
    0.195436324612336,
    -0.12970362510245298,
    0.0633256819583772,
    -0.015209037318747697,
)

# What is smaller counts as this power of two.
LEAST_POWER = -126.0


def exact_exp2(x: Tensor) -> Tensor:
    """2^x for fp32 `x` up to 0, `-inf` included; at least 2^-126."""
    x = x.clamp(min=LEAST_POWER)
    whole = x.floor()
    part = x - whole
    value = (part * (part - 1.0)) * _polynomial(part, EXP2) + (part + 1.0)
    return value * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


def exact_log2(x: Tensor) -> Tensor:
    """The binary logarithm of normal fp32 `x > 0`."""
    bits = x.view(torch.int32)
    part = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    value = (part * (1.0 - part)) * _polynomial(part, LOG2) + part
    return value + ((bits >> 23) - 127).float()


def log2_sum_of_four(terms: Sequence[Tensor]) -> Tensor:
    """`log2(2^a + 2^b + 2^c + 2^d)` of four fp32 tensors of one shape, of which the largest is finite everywhere."""
    first, second, third, fourth = terms
    most = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
    powers = [exact_exp2(x - most) for x in terms]
    return most + exact_log2((powers[0] + powers[1]) + (powers[2] + powers[3]))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
