"""How far two results lie apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """Between a result and what it is compared with.

    Attributes:
        max_abs: largest absolute difference.
        relative_rms: root mean square of the difference, as a share of that of the reference.
        psnr: peak signal-to-noise ratio in dB over the reference's range; infinite for equal ones.
    """

    max_abs: float
    relative_rms: float
    psnr: float

    def to_json(self) -> dict[str, float | None]:
        """JSON knows no infinity and no NaN: None stands for them."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"max abs {self.max_abs:.3g}, relative RMS {self.relative_rms:.3g}, PSNR {self.psnr:.1f} dB"


def difference(result: Tensor, reference: Tensor, peak: float | None = None) -> Difference:
    """Compare two tensors of one shape; `peak` is the range of the values, by default that of the reference."""
    got, wanted = result.double(), reference.double()
    error = (got - wanted).square().mean().sqrt().item()
    scale = wanted.square().mean().sqrt().item()
    peak = (wanted.max() - wanted.min()).item() if peak is None else peak
    return Difference(
        max_abs=(got - wanted).abs().max().item(),
        relative_rms=error / scale if scale else (0.0 if error == 0.0 else math.inf),
        psnr=20 * math.log10(peak / error) if error > 0.0 and peak > 0.0 else (math.inf if error == 0.0 else math.nan),
    )
