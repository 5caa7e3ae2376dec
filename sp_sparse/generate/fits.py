"""What a model can make of what is asked for: one set of rules for `generate` and the server.

`named` turns the name of a setting into what its user wrote: `flag_of` on a command line, `str` in a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sp_sparse.flags import flag_of

Named = Callable[[str], str]


def check_side(name: str, pixels: int, multiple: int, named: Named) -> None:
    """Refuse a height or width that would be rounded.

    Raises:
        ValueError: with the nearest ones that fit.
    """
    if pixels % multiple:
        below = pixels // multiple * multiple
        raise ValueError(
            f"{named(name)} {pixels}: heights and widths are multiples of {multiple}; use "
            f"{_either(below, below + multiple)}"
        )


def check_frames(frames: int, multiple: int, named: Named) -> None:
    """Refuse a number of frames that would be rounded.

    Raises:
        ValueError: with the nearest ones that fit.
    """
    if (frames - 1) % multiple:
        below = (frames - 1) // multiple * multiple + 1
        raise ValueError(
            f"{named('num_frames')} {frames}: frames are {multiple}n + 1; use {_either(below, below + multiple)}"
        )


def check_negative_prompt(scale: float | None, negative_prompt: str, named: Named) -> None:
    """Refuse a negative prompt that nothing would read.

    Raises:
        ValueError: guidance is off.
    """
    if negative_prompt and scale is not None and scale <= 1:
        raise ValueError(
            f"{named('negative_prompt')} is given, but {named('guidance_scale')} {scale:g} switches guidance off, so that "
            f"nothing reads it; use a scale above 1, or leave {named('negative_prompt')} out"
        )


def check_guidance(scale: float | None, scale_2: float | None, experts: int, model: str, named: Named) -> None:
    """Refuse a second expert's guidance that nothing would read.

    Raises:
        ValueError: there is no second expert, or guidance is off.
    """
    if scale_2 is None:
        return
    if experts < 2:
        raise ValueError(
            f"{named('guidance_scale_2')} {scale_2:g} is for a second expert: {model} has no second expert; leave "
            f"{named('guidance_scale_2')} out"
        )
    if scale is not None and scale <= 1:
        raise ValueError(
            f"{named('guidance_scale_2')} {scale_2:g} is given, but {named('guidance_scale')} {scale:g} switches guidance "
            f"off for both experts; use a scale above 1, or leave {named('guidance_scale_2')} out"
        )


def check_clip_length(name: str, path: str, has: int, frames: int, multiple: int) -> None:
    """Refuse more frames than the video that is given has.

    Raises:
        ValueError: with the most that fit.
    """
    if frames > has:
        most = (has - 1) // multiple * multiple + 1
        raise ValueError(
            f"--num-frames {frames} is above the {has} frames of {flag_of(name)} {path}; use {most} or fewer"
        )


def check_strength(strength: float, steps: int) -> None:
    """Refuse a strength that leaves no step to run: of all steps, the last ones are run, by this share.

    Raises:
        ValueError: with the least that leaves one.
    """
    if int(steps * strength) < 1:
        raise ValueError(
            f"--strength {strength:g} leaves none of --num-inference-steps {steps}; use {1 / steps:.2g} or more, or more "
            "steps"
        )


def size_for_picture(
    picture: tuple[int, int], height: int | None, width: int | None, pixels: int, multiple: int
) -> tuple[int, int]:
    """Height and width of a video that starts from a picture, as Wan's own code chooses them.

    Args:
        picture: its width and height.
        height, width: what is asked for; a side left open follows the other by the picture's aspect.
        pixels: height x width that is not exceeded where both are open.
    """
    aspect = picture[1] / picture[0]
    if height is None and width is None:
        height, width = (
            max(round(math.sqrt(area)) // multiple, 1) * multiple for area in (pixels * aspect, pixels / aspect)
        )
    elif height is None and width is not None:
        height = max(round(width * aspect / multiple), 1) * multiple
    elif width is None and height is not None:
        width = max(round(height / aspect / multiple), 1) * multiple
    assert height is not None
    assert width is not None
    return height, width


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else str(above)
