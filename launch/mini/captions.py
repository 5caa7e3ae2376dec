"""Captions of scenes, from a small grammar with several phrasings."""

from __future__ import annotations

import random

from launch.mini.scenes import Figure, Scene

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
    camera = rng.choice(_CAMERA[scene.camera])
    unsaid = scene.camera == "still" and rng.random() < 0.5
    style = rng.randrange(4)
    if style == 0:
        figures = " and ".join(_figure(figure, rng, finite=True) for figure in scene.figures)
        text = f"{figures} {background}"
        return text if unsaid else f"{text} while {camera}"
    if style == 1:
        figures = " and ".join(_figure(figure, rng, finite=False) for figure in scene.figures)
        text = f"{figures} {background}"
        return text if unsaid else f"{text}, {camera}"
    if style == 2:
        figures = ", and ".join(_figure(figure, rng, finite=True) for figure in scene.figures)
        text = f"{background}, {figures}"
        return text if unsaid else f"{text}; {camera}"
    figures = ", ".join(_figure(figure, rng, finite=False) for figure in scene.figures)
    text = f"a video of {figures} {background}"
    return text if unsaid else f"{text} while {camera}"


def _figure(figure: Figure, rng: random.Random, finite: bool) -> str:
    verb = rng.choice(_VERBS)[0 if finite else 1]
    return f"a {figure.color} {figure.shape} {verb} {rng.choice(_TOWARDS[figure.direction])}"
