"""Tells from a video's pixels alone which figures it shows: color, shape, direction. No network, no caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.mini.captions import kinds_told
from launch.mini.clips import coverage
from launch.mini.scenes import COLORS, DIRECTIONS, SHAPES, TONES, Kind

_FURTHEST = 0.5  # of a pixel from a color, in RGB of 0 to 1
_SMALLEST = 0.012  # share of the frame that a figure covers at least
_SEEN = 0.6  # share of the frames that a figure is in at least
_LIKENESS = 0.6  # intersection over union with the shape, at least
_TRAVEL = 0.12  # of the frame's side, at least
_PATCH = 32
_REACH = 0.9  # of the patch, in square roots of the figure's area
_FRAMES = 9  # looked at for the shape


@dataclass(frozen=True)
class Seen:
    """A figure; None for a shape or direction that is like none."""

    color: str
    shape: str | None
    direction: str | None


@dataclass(frozen=True)
class Verdict:
    """What of a scene's figures is in a video as told, for all of its figures together."""

    color: bool
    shape: bool
    direction: bool

    @property
    def followed(self) -> bool:
        return self.color and self.shape and self.direction


def follows_caption(frames: Tensor, caption: str) -> float:
    """1 if a video [T, H, W, 3], in 0 to 1, shows the figures of its caption, else 0: a `--caption-check` of fidelity.

    Raises:
        ValueError: a caption that is none of the grammar.
    """
    return float(judge(frames.permute(0, 3, 1, 2), kinds_told(caption)).followed)


def judge(video: Tensor, figures: Sequence[Kind]) -> Verdict:
    """Whether a video [T, 3, H, W], in 0 to 1, shows these figures. Shape and direction count for the right color."""
    seen = {figure.color: figure for figure in recognise(video, len(figures))}
    found = [(seen.get(figure.color), figure) for figure in figures]
    return Verdict(
        color=all(one is not None for one, _ in found),
        shape=all(one is not None and one.shape == figure.shape for one, figure in found),
        direction=all(one is not None and one.direction == figure.direction for one, figure in found),
    )


def recognise(video: Tensor, figures: int) -> list[Seen]:
    """The largest figures, at most so many, of a video [T, 3, H, W] in 0 to 1."""
    masks = _color_masks(video.float())
    areas = masks.mean((2, 3))
    visible = areas > _SMALLEST
    size = torch.where(visible, areas, 0.0).mean(1)
    size = torch.where(visible.float().mean(1) >= _SEEN, size, 0.0)
    found = []
    for number in size.topk(figures).indices.tolist():
        if size[number] > 0:
            mask = masks[number, visible[number]]
            moments = torch.nonzero(visible[number]).flatten()
            centers = _centers(mask)
            shape = _shape(mask, centers)
            found.append(Seen(list(COLORS)[number], shape, _direction(centers, moments, len(video))))
    return found


def _color_masks(video: Tensor) -> Tensor:
    """[colors, T, H, W], 1 where a pixel is nearest to a color, single pixels smoothed away."""
    dark = [tuple(factor * part for part in tone) for tone in TONES.values() for factor in (1.0, 0.4)]
    palette = torch.tensor([*COLORS.values(), *dark], device=video.device)
    pixels = video.movedim(1, -1)
    distance = torch.cdist(pixels.reshape(-1, 3), palette)
    nearest = distance.argmin(1)
    nearest = torch.where(distance.amin(1) < _FURTHEST, nearest, len(COLORS)).view(pixels.shape[:-1])
    masks = torch.stack([nearest == number for number in range(len(COLORS))]).float()
    return (F.avg_pool2d(masks, 3, 1, 1) > 0.5).float()


def _centers(mask: Tensor) -> Tensor:
    """[T, 2], x and y in 0 to 1; what is far from the bulk of a mask does not count."""
    height, width = mask.shape[1:]
    x = ((torch.arange(width, device=mask.device) + 0.5) / width).view(1, 1, width)
    y = ((torch.arange(height, device=mask.device) + 0.5) / height).view(1, height, 1)
    weight = mask
    for _ in range(3):
        total = weight.sum((1, 2)).clamp_min(1e-6)
        center = torch.stack([(weight * x).sum((1, 2)) / total, (weight * y).sum((1, 2)) / total], 1)
        far = (x - center[:, 0].view(-1, 1, 1)).square() + (y - center[:, 1].view(-1, 1, 1)).square()
        weight = mask * (far < 0.3**2)
    return center


def _shape(mask: Tensor, centers: Tensor) -> str | None:
    frames = torch.linspace(0, len(mask) - 1, min(_FRAMES, len(mask)), device=mask.device).round().long()
    patches = _patches(mask[frames], centers[frames])
    likeness = _likeness(patches, _templates().to(mask.device)).mean(0)
    best = int(likeness.argmax())
    return SHAPES[best] if likeness[best] >= _LIKENESS else None


def _patches(mask: Tensor, centers: Tensor) -> Tensor:
    """[T, P, P]: masks about their centers, in units of the square root of their area."""
    scale = mask.mean((1, 2)).clamp_min(1e-6).sqrt().view(-1, 1, 1, 1) * 2 * _REACH
    axis = torch.linspace(-1, 1, _PATCH, device=mask.device)
    offsets = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    grid = 2 * centers.view(-1, 1, 1, 2) - 1 + offsets * scale
    return F.grid_sample(mask.unsqueeze(1), grid, align_corners=False)[:, 0]


def _likeness(patches: Tensor, templates: Tensor) -> Tensor:
    """Intersection over union [T, shapes]."""
    one, other = patches.flatten(1).unsqueeze(1), templates.flatten(1)
    return torch.minimum(one, other).sum(-1) / torch.maximum(one, other).sum(-1).clamp_min(1e-6)


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """[shapes, P, P], made as those of a video are."""
    side = 256
    axis = (torch.arange(side) + 0.5) / side - 0.5
    shape = torch.arange(len(SHAPES)).view(-1, 1, 1)
    mask = (coverage(shape, axis.view(1, 1, -1), axis.view(1, -1, 1), torch.tensor(0.2)) > 0).float()
    return _patches(mask, _centers(mask))


def _direction(centers: Tensor, moments: Tensor, frames: int) -> str | None:
    """Of the straight line through the centers."""
    time = moments.float() / max(1, frames - 1)
    time = time - time.mean()
    slope = (time.unsqueeze(1) * (centers - centers.mean(0))).sum(0) / time.square().sum().clamp_min(1e-6)
    dx, dy = slope.tolist()
    if math.hypot(dx, dy) < _TRAVEL:
        return None

    def agreement(name: str) -> float:
        x, y = DIRECTIONS[name]
        return (dx * x + dy * y) / math.hypot(x, y)

    return max(DIRECTIONS, key=agreement)
