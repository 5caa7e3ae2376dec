"""Renders scenes as clips, many at once, on any device; the same scene gives the same clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from launch.mini.scenes import CAMERAS, COLORS, PATTERNS, SHAPES, TONES, Figure, Scene

_PAN = 0.35  # of the frame, over the whole clip
_ZOOM_IN, _ZOOM_OUT = 0.35, 0.45
_EDGE_PIXELS = 1.5  # sharpness of a figure's edge, a pixel
_CONTRAST = 5.0
_DARKER = 0.4  # the pattern's second tone


def render(
    scenes: Sequence[Scene], frames: int, side: int, device: torch.device | str = "cpu", window: slice = slice(None)
) -> Tensor:
    """Clips [B, 3, frames, side, side] in -1 to 1, float32; with a `window`, only those of their frames."""
    time = torch.linspace(0, 1, frames, device=device)[window].view(1, -1, 1, 1)
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = axis.view(1, 1, side, 1), axis.view(1, 1, 1, side)
    picture = _background(scenes, time, x, y)
    # The first figure is in front.
    for number in reversed(range(max(len(scene.figures) for scene in scenes))):
        rows = [row for row, scene in enumerate(scenes) if number < len(scene.figures)]
        index = torch.tensor(rows, device=device)
        figures = [scenes[row].figures[number] for row in rows]
        alpha, color = _figures(figures, time, x, y, side)
        picture[index] = picture[index] * (1 - alpha) + color * alpha
    return picture.mul_(2).sub_(1)


def coverage(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a shape's edge, positive inside, about in the units of `dx`; `shape` indexes SHAPES."""
    far = (dx.square() + dy.square()).sqrt()
    ax, ay = dx.abs(), dy.abs()
    bar = torch.minimum(1.1 * radius - ax, 0.38 * radius - ay)
    other = torch.minimum(0.38 * radius - ax, 1.1 * radius - ay)
    inside = {
        "circle": radius - far,
        "square": 0.88 * radius - torch.maximum(ax, ay),
        "triangle": 0.625 * radius - torch.maximum(dy, math.sqrt(0.75) * ax - 0.5 * dy),
        "diamond": (1.2 * radius - ax - ay) / math.sqrt(2),
        "ring": 0.3 * radius - (far - 0.85 * radius).abs(),
        "cross": torch.maximum(bar, other),
    }
    out = inside[SHAPES[0]]
    for number, name in enumerate(SHAPES[1:], start=1):
        out = torch.where(shape == number, inside[name], out)
    return out


def _figures(figures: Sequence[Figure], time: Tensor, x: Tensor, y: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Opacity [B, 1, T, S, S] and color [B, 3, T, S, S]."""
    device = time.device
    start = _column([figure.start for figure in figures], device)
    end = _column([figure.end for figure in figures], device)
    center = start + (end - start) * time
    radius = _column([(figure.radius,) for figure in figures], device)[0]
    shape = _column([(SHAPES.index(figure.shape),) for figure in figures], device)[0]
    dx, dy = x - center[0], y - center[1]
    alpha = torch.sigmoid(coverage(shape, dx, dy, radius) * side * _EDGE_PIXELS).unsqueeze(1)
    shade = (0.93 - 0.07 * dy / radius).clamp(0.8, 1.0).unsqueeze(1)  # light from above
    color = _column([COLORS[figure.color] for figure in figures], device).transpose(0, 1)
    return alpha, color * shade


def _background(scenes: Sequence[Scene], time: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, T, S, S] in 0 to 1."""
    device = time.device
    camera = _column([(CAMERAS.index(scene.camera),) for scene in scenes], device)[0]

    def is_camera(name: str) -> Tensor:
        return (camera == CAMERAS.index(name)).float()

    # The pattern goes the other way than the camera.
    across = _PAN * time * (is_camera("right") - is_camera("left"))
    along = _PAN * time * (is_camera("down") - is_camera("up"))
    scale = 1 + time * (_ZOOM_OUT * is_camera("out") - _ZOOM_IN * is_camera("in"))
    u, v = (x - 0.5) * scale + across, (y - 0.5) * scale + along

    phase = _column([scene.phase for scene in scenes], device)
    turn = 2 * math.pi * _column([(scene.periods,) for scene in scenes], device)[0]
    wave = {
        "stripes": torch.sin(0.8 * turn * (u + v) + phase[0]),
        "checks": 2 * torch.sin(0.7 * turn * u + phase[0]) * torch.sin(0.7 * turn * v + phase[1]),
        "dots": torch.cos(turn * u + phase[0]) + torch.cos(turn * v + phase[1]) - 0.7,
        "ripples": torch.sin(turn * (u.square() + v.square() + 1e-6).sqrt() + phase[0]),
        "waves": torch.sin(turn * (v + 0.05 * torch.sin(2 * turn / 3 * u + phase[1])) + phase[0]),
    }
    pattern = _column([(PATTERNS.index(scene.pattern),) for scene in scenes], device)[0]
    height = wave[PATTERNS[0]]
    for number, name in enumerate(PATTERNS[1:], start=1):
        height = torch.where(pattern == number, wave[name], height)
    share = torch.sigmoid(_CONTRAST * height).unsqueeze(1)
    tone = _column([TONES[scene.tone] for scene in scenes], device).transpose(0, 1)
    return tone * (share + _DARKER * (1 - share))


def _column(rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """[len(row), B, 1, 1, 1]: numbers of every scene, ready to broadcast over frames and pixels."""
    return torch.tensor(rows, dtype=torch.float32, device=device).t().reshape(len(rows[0]), len(rows), 1, 1, 1)
