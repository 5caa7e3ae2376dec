"""Making videos again from the same seed, and how far two results lie apart."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sp_sparse import SequenceParallelMesh
from sp_sparse.generate.stages import Stages
from sp_sparse.generate.video import Video, VideoMaker
from sp_sparse.integrations.diffusers import enable_sparse_attention


def verify(makers: list[VideoMaker], videos: list[Video]) -> dict[str, Any] | None:
    """Make the videos again, each rank alone, and compare; the same answer on every rank."""
    pipe, arguments, ranks = makers[0].pipe, makers[0].arguments, makers[0].ranks
    if arguments.verify == "none":
        return None
    told, worst = [], 0.0
    with ExitStack() as undo:
        if arguments.verify == "single":
            undo.enter_context(enable_sparse_attention(pipe, arguments.sparse, SequenceParallelMesh()))
        for maker, video in zip(makers, videos, strict=True):
            again = maker.make(video.prompt, Stages(ranks))
            # Each rank compares what it holds, so that ranks that drifted apart are seen too.
            every = ranks.gather(difference(video.latents, again.latents))
            latents = max(every, key=lambda d: math.inf if math.isnan(d.relative_rms) else d.relative_rms)
            worst = max(worst, math.inf if math.isnan(latents.relative_rms) else latents.relative_rms)
            told.append({"latents": latents.to_json()})
            ranks.say(f"verify {arguments.verify}: latents {latents}")
            if video.frames is not None and again.frames is not None:
                frames = difference(video.frames, again.frames, peak=1.0)
                told[-1]["frames"] = frames.to_json()
                ranks.say(f"verify {arguments.verify}: frames {frames}")
    tolerance = arguments.verify_tolerance
    passed = tolerance is None or worst <= tolerance
    if not passed:
        ranks.say(f"error: the relative RMS difference of the latents is {worst:.3g}, above {tolerance:g}")
    return {"against": arguments.verify, "tolerance": tolerance, "passed": passed, "videos": told}


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
