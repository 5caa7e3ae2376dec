"""Caption checks for tests, found by their names."""

from __future__ import annotations

from torch import Tensor


def brightness(frames: Tensor, prompt: str) -> float:
    """In place of a check: what is bright shows its caption."""
    assert frames.ndim == 4
    assert frames.shape[3] == 3
    return float(frames.mean()) if prompt else 0.0


NO_CHECK = "a text"


def broken(frames: Tensor, prompt: str) -> float:
    raise KeyError(prompt)


def wrong(frames: Tensor, prompt: str) -> float:
    return 2.0
