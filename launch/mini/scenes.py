"""What a clip shows: one or two figures that move over a pattern under a moving camera, and which of them are held out."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

# RGB in 0 to 1. Corners of the cube: far from each other, and from every tone below.
COLORS = {
    "red": (0.92, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
# On the screen, x to the right and y down; the camera does not change them.
DIRECTIONS = {
    "right": (1, 0),
    "down right": (1, 1),
    "down": (0, 1),
    "down left": (-1, 1),
    "left": (-1, 0),
    "up left": (-1, -1),
    "up": (0, -1),
    "up right": (1, -1),
}
# Of the backgrounds: dark, so that no figure is lost in them.
TONES = {
    "dark red": (0.42, 0.10, 0.10),
    "dark green": (0.08, 0.34, 0.12),
    "dark blue": (0.10, 0.14, 0.45),
    "purple": (0.32, 0.12, 0.40),
    "brown": (0.40, 0.26, 0.12),
    "gray": (0.40, 0.40, 0.42),
}
PATTERNS = ("stripes", "checks", "dots", "ripples", "waves")
CAMERAS = ("still", "left", "right", "up", "down", "in", "out")

HELD_OUT_ONE_IN = 8
_SHARE_OF_TWO = 0.2
# Of training clips: two figures are learnt last.
_SHARE_OF_TWO_TRAINED = 0.6
_EDGE = 0.03  # room between a figure and the frame's edge
_PLACEMENTS = 16  # tried for two figures; the one that keeps them furthest apart is taken


@dataclass(frozen=True)
class Kind:
    """What a caption tells of a figure."""

    color: str
    shape: str
    direction: str


@dataclass(frozen=True)
class Figure(Kind):
    """Lengths are shares of the frame's side; the centre goes from `start` to `end` at constant speed."""

    radius: float
    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def held_out(self) -> bool:
        return is_held_out(self.color, self.shape, self.direction)


@dataclass(frozen=True)
class Scene:
    """`periods` of the pattern lie side by side in the frame; `phase` in radians, for x and y."""

    figures: tuple[Figure, ...]
    pattern: str
    tone: str
    camera: str
    periods: float
    phase: tuple[float, float]


def is_held_out(color: str, shape: str, direction: str) -> bool:
    """Whether this combination is kept for testing: decided by a hash of it, so that it never changes."""
    digest = hashlib.blake2s(f"{color} {shape} {direction}".encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, held_out: bool) -> Scene:
    """A scene whose figures are all held out, or all not."""
    count = 2 if rng.random() < (_SHARE_OF_TWO if held_out else _SHARE_OF_TWO_TRAINED) else 1
    kinds: list[tuple[str, str, str]] = []
    while len(kinds) < count:
        kind = rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))
        if is_held_out(*kind) == held_out and kind[0] not in [color for color, _, _ in kinds]:
            kinds.append(kind)
    tries = [tuple(_place(rng, kind, count) for kind in kinds) for _ in range(_PLACEMENTS if count == 2 else 1)]
    return Scene(
        figures=max(tries, key=_clearance),
        pattern=rng.choice(PATTERNS),
        tone=rng.choice(list(TONES)),
        camera=rng.choice(CAMERAS),
        periods=rng.uniform(3.0, 5.0),
        phase=(rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)),
    )


def _place(rng: random.Random, kind: tuple[str, str, str], count: int) -> Figure:
    color, shape, direction = kind
    radius = rng.uniform(0.14, 0.20) if count == 1 else rng.uniform(0.12, 0.15)
    low, high = 1.25 * radius + _EDGE, 1 - 1.25 * radius - _EDGE  # no shape reaches further than 1.25 radii
    travel = rng.uniform(0.35, high - low)
    start = []
    for step in DIRECTIONS[direction]:
        free = rng.uniform(low, high - travel * abs(step))
        start.append(free + travel if step < 0 else free)
    end = [at + travel * step for at, step in zip(start, DIRECTIONS[direction], strict=True)]
    return Figure(color, shape, direction, radius, (start[0], start[1]), (end[0], end[1]))


def _clearance(figures: Sequence[Figure]) -> float:
    """Room between the two at their closest; of one figure, nothing to compare."""
    if len(figures) == 1:
        return 0.0
    one, other = figures
    gaps = []
    for step in range(9):
        share = step / 8
        at = [[a + share * (b - a) for a, b in zip(figure.start, figure.end, strict=True)] for figure in figures]
        gaps.append(math.dist(at[0], at[1]) - one.radius - other.radius)
    return min(gaps)
