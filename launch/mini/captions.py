"""Captions of scenes, from a small grammar with several phrasings."""

from __future__ import annotations

import random
import re

from launch.mini.scenes import COLORS, PATTERNS, SHAPES, TONES, Figure, Kind, Scene

_VERBS = (("moves", "moving"), ("glides", "gliding"), ("drifts", "drifting"), ("slides", "sliding"))
_TOWARDS = {
    "right": ("to the right", "right"),
    "left": ("to the left", "left"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "down right": ("down and to the right", "to the lower right"),
    "down left": ("down and to the left", "to the lower left"),
    "up left": ("up and to the left", "to the upper left"),
    "up right": ("up and to the right", "to the upper right"),
}
_CAMERA = {
    "still": ("the camera stands still",),
    "left": ("the camera pans left", "the camera pans to the left"),
    "right": ("the camera pans right", "the camera pans to the right"),
    "up": ("the camera pans up", "the camera pans upwards"),
    "down": ("the camera pans down", "the camera pans downwards"),
    "in": ("the camera zooms in",),
    "out": ("the camera zooms out",),
}
_OVER = ("over", "across", "in front of")


def caption_of(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say what a scene shows; a still camera may go unsaid."""
    background = f"{rng.choice(_OVER)} {scene.tone} {scene.pattern}"
    finite = rng.random() < 0.5
    figures = " and ".join(_figure(figure, rng, finite) for figure in scene.figures)
    if not finite:
        text = f"{rng.choice(('', 'a video of '))}{figures} {background}"
    elif rng.random() < 0.5:
        text = f"{figures} {background}"
    else:
        text = f"{background}, {figures}"
    if scene.camera != "still" or rng.random() < 0.5:
        text += rng.choice((" while ", ", ")) + rng.choice(_CAMERA[scene.camera])
    if rng.random() < 0.5:
        text = f"{text[0].upper()}{text[1:]}."
    return text


def kinds_told(caption: str) -> list[Kind]:
    """The figures that a caption tells of, in its order.

    Raises:
        ValueError: it tells of none, as captions of `caption_of` do not.
    """
    return [kind for kind, _ in figures_told(caption)]


def figures_told(caption: str) -> list[tuple[Kind, tuple[int, int]]]:
    """The figures that a caption tells of, each with the first letter of its words and the one after the last.

    Raises:
        ValueError: it tells of none, as captions of `caption_of` do not.
    """
    phrases = {phrase: direction for direction, options in _TOWARDS.items() for phrase in options}
    # Longest first: "down" begins "down and to the right".
    toward = "|".join(sorted(phrases, key=len, reverse=True))
    verb = "|".join(form for forms in _VERBS for form in forms)
    pattern = rf"\ba ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) (?:{verb}) ({toward})\b"
    found = list(re.finditer(pattern, caption, re.IGNORECASE))
    if not found:
        raise ValueError(
            f"{caption!r} tells of no figure as mini's captions do, such as 'a red circle moves to the left over gray dots'"
        )
    return [(Kind(m[1].lower(), m[2].lower(), phrases[m[3].lower()]), m.span()) for m in found]


def vocabulary() -> list[str]:
    """Every word of every caption, with its first letter as it may stand, sorted."""
    phrases = [*_OVER, "a video of", "and", "while", *COLORS, *SHAPES, *TONES, *PATTERNS]
    phrases += [phrase for group in (*_VERBS, *_TOWARDS.values(), *_CAMERA.values()) for phrase in group]
    first = [word.capitalize() for phrase in (*_OVER, "a") for word in phrase.split()[:1]]
    return sorted({word for phrase in phrases for word in phrase.split()} | set(first))


def _figure(figure: Figure, rng: random.Random, finite: bool) -> str:
    verb = rng.choice(_VERBS)[0 if finite else 1]
    return f"a {figure.color} {figure.shape} {verb} {rng.choice(_TOWARDS[figure.direction])}"
