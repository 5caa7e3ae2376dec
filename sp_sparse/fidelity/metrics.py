"""How far a video lies from another: PSNR, SSIM and, where its weights are there, LPIPS, by torchmetrics."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_sparse.fidelity.store import Frames

# (frames [T, H, W, 3] in [0, 1] on the device of the job, prompt) -> share of the caption that the video shows
CaptionCheck = Callable[[Tensor, str], float]

# Pixels of a video that are looked at together: SSIM holds about twenty tensors of this size in float32.
_BUDGET = 1 << 21

# What AlexNet's two poolings leave nothing of is smaller.
_LPIPS_SIDE = 31


class VideoMetrics:
    """Compares videos of 8 bits a channel, which are what a file holds."""

    def __init__(self, device: torch.device, side: int) -> None:
        """LPIPS is left out where it cannot be computed; `without_lpips` then tells why.

        Args:
            device: where to compute.
            side: pixels of the shorter side of the videos.

        Raises:
            ValueError: LPIPS's weights are there and cannot be read.
        """
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        self._device = device
        # Rank 0 compares alone: nothing may wait for the other ranks.
        alone: dict[str, Any] = {"sync_on_compute": False}
        self._metrics: dict[str, Any] = {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, **alone).to(device),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0, **alone).to(device),
        }
        self.without_lpips = _missing_for_lpips(side)
        if self.without_lpips is None:
            self._metrics["lpips"] = _lpips(alone).to(device)

    @torch.no_grad()
    def compare(self, frames: Frames, reference: Frames) -> dict[str, float | None]:
        """PSNR in dB over all pixels of the video, and the mean over its frames of SSIM and LPIPS.

        Args:
            frames, reference: `[T, H, W, 3]`, sides of at least 11 pixels.

        Returns:
            `psnr` (None for equal videos, whose PSNR is infinite), `ssim`, `lpips` (None without its weights).
        """
        for first in range(0, len(frames), step := max(1, _BUDGET // frames[0].size)):
            part = slice(first, first + step)
            got, wanted = (self._images(video[part]) for video in (frames, reference))
            for metric in self._metrics.values():
                metric.update(got, wanted)
        found: dict[str, float | None] = {"lpips": None}
        for name, metric in self._metrics.items():
            found[name] = float(metric.compute())
            metric.reset()
        return {**found, "psnr": None if found["psnr"] == float("inf") else found["psnr"]}

    def _images(self, frames: Frames) -> Tensor:
        return as_float(frames).to(self._device).permute(0, 3, 1, 2)


def as_bytes(frames: Tensor) -> Frames:
    """`[T, H, W, 3]` in [0, 1], rounded to 8 bits."""
    pixels: Frames = (frames * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def as_float(frames: Frames) -> Tensor:
    """8 bits back to [0, 1]."""
    return torch.from_numpy(frames).float() / 255


def load_caption_check(path: str) -> CaptionCheck:
    """The function that `package.module:function` names.

    Raises:
        ValueError: it cannot be imported, or is no function.
    """
    module, _, name = path.partition(":")
    try:
        check: CaptionCheck = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--caption-check {path} cannot be loaded ({error}); give package.module:function, importable from here"
        ) from error
    if not callable(check):
        raise ValueError(
            f"--caption-check {path} is a {type(check).__name__}; give package.module:function, importable from here"
        )
    return check


def check_caption(check: CaptionCheck | None, frames: Frames, prompt: str, device: torch.device) -> float | None:
    """The share of the caption that a video shows, in [0, 1]; None without a check.

    Raises:
        ValueError: the check fails, or gives something else.
    """
    if check is None:
        return None
    try:
        share = float(check(as_float(frames).to(device), prompt))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"--caption-check failed for {prompt!r} ({type(error).__name__}: {error}); mend it, --debug shows where"
        ) from error
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"--caption-check gave {share} for {prompt!r}; it must give a share from 0 to 1")
    return share


def _missing_for_lpips(side: int) -> str | None:
    """Why LPIPS cannot be computed here without a download, or None."""
    if side < _LPIPS_SIDE:
        return f"a side of {side} pixels is below the {_LPIPS_SIDE} that AlexNet needs"
    if find_spec("torchvision") is None:
        return "torchvision is not installed"
    return None if _lpips_weights().is_file() else f"AlexNet's weights are not at {_lpips_weights()}"


def _lpips_weights() -> Path:
    """Where torchvision keeps what LPIPS compares features of."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.DEFAULT.url).name)


def _lpips(how: dict[str, Any]) -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True, **how)
    except Exception as error:  # whatever torch.load has to say of a broken file
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"AlexNet's weights at {_lpips_weights()} cannot be read ({told}); remove the file to leave LPIPS out, or put a "
            "whole one there"
        ) from error
