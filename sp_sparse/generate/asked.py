"""Whether a model can make what is asked for, before its weights are read, and its own values for what is left open."""

from __future__ import annotations

from dataclasses import replace

from sp_sparse.config import FLAG_PREFIX, SECOND_EXPERT
from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.defaults import STRENGTH
from sp_sparse.generate.fits import (
    Named,
    check_clip_length,
    check_frames,
    check_guidance,
    check_negative_prompt,
    check_side,
    check_strength,
    size_for_picture,
)
from sp_sparse.generate.models import WanModel
from sp_sparse.generate.sources import Clip, check_picture, look_at_clip, picture_size

_MOST_FPS = 120  # that --fps takes


def check_start(arguments: GenerateArguments, model: WanModel) -> None:
    """Refuse a picture or video too many or too few.

    Raises:
        ValueError: with what the model takes.
    """
    name = arguments.model
    if arguments.image is not None and model.takes_control:
        raise ValueError(f"--image is given, but {name} is VACE; give what it shows with --reference-image")
    if arguments.image is not None and not model.takes_image:
        raise ValueError(f"--image is given, but {name} makes videos from text alone; leave --image out")
    if arguments.image is None and model.takes_image and not model.draws_image:
        raise ValueError(f"{name} makes videos from an image; give its first frame with --image")
    if arguments.last_image is not None and not model.takes_last_image:
        made = "from its first frame alone" if model.takes_image else "from text alone"
        raise ValueError(f"--last-image is given, but {name} makes videos {made}; leave --last-image out")
    if arguments.last_image is None and model.needs_last_image:
        raise ValueError(f"{name} makes videos between two images; give the last frame with --last-image")
    _check_control(arguments, model)
    if arguments.video is not None and not (model.takes_video or model.takes_control):
        raise ValueError(
            f"--video is for diffusers' video-to-video, which {name} does not do: {_why_no_video(model)}; use a Wan 2.1 "
            "text-to-video model, such as tiny-2.1, or leave --video out"
        )
    for flag in ("image", "last_image"):
        path = getattr(arguments, flag)
        if path is not None:
            check_picture(flag, path)
    for path in arguments.reference_image:
        check_picture("reference_image", path)


def _check_control(arguments: GenerateArguments, model: WanModel) -> None:
    if model.takes_control:
        if arguments.strength is not None:
            raise ValueError(
                f"--strength {arguments.strength:g} is for video-to-video, and {arguments.model} is VACE, whose --mask says "
                "what is made anew; leave --strength out"
            )
        return
    for name in ("mask", "reference_image", "conditioning_scale"):
        if getattr(arguments, name) not in (None, ()):
            flag = flag_of(name)
            raise ValueError(
                f"{flag} is for VACE, which {arguments.model} is not; leave {flag} out, or use a VACE model"
            )


def _why_no_video(model: WanModel) -> str:
    if model.takes_image:
        return "it makes videos from an image"
    if model.experts > 1:
        return "it has two experts, and that loop runs the first alone"
    return "its VAE shrinks pictures by another factor than 8"


def check_video(arguments: GenerateArguments, model: WanModel, named: Named = flag_of) -> None:
    """Refuse what the model would round, ignore or fail at, after its own values have been filled in.

    Raises:
        ValueError: with the nearest values that fit, or the setting to leave out.
    """
    for name, pixels in (("height", arguments.height), ("width", arguments.width)):
        assert pixels is not None  # filled
        check_side(name, pixels, model.spatial_multiple, named)
        if pixels > (most := model.positions * model.spatial_multiple):
            raise ValueError(
                f"{named(name)} {pixels} is above the {most} that {arguments.model} has places for; use less"
            )
    assert arguments.num_frames is not None
    check_frames(arguments.num_frames, model.temporal_multiple, named)
    # Each reference image is a latent frame more.
    places = model.positions - len(arguments.reference_image)
    if arguments.num_frames > (most := (places - 1) * model.temporal_multiple + 1):
        raise ValueError(
            f"{named('num_frames')} {arguments.num_frames} is above the {most} that {arguments.model} has places for; use "
            "fewer"
        )
    check_guidance(arguments.guidance_scale, arguments.guidance_scale_2, model.experts, arguments.model, named)
    check_negative_prompt(arguments.guidance_scale, arguments.negative_prompt, named)
    if arguments.strength is not None:
        assert arguments.num_inference_steps is not None  # filled
        check_strength(arguments.strength, arguments.num_inference_steps)
    if arguments.scheduler != "model":
        if arguments.flow_shift is None and not model.takes_flow_shift:
            raise ValueError(
                f"{named('scheduler')} {arguments.scheduler} needs a shift, and the scheduler of {arguments.model} has none "
                f"or does not use it; add {named('flow_shift')}"
            )
    elif arguments.flow_shift is not None and not model.takes_flow_shift:
        raise ValueError(
            f"{named('flow_shift')} {arguments.flow_shift:g}: the scheduler of {arguments.model} has no shift, or does not "
            f"use it; leave {named('flow_shift')} out"
        )


def check_second_expert(arguments: GenerateArguments, model: WanModel) -> None:
    """Refuse what is for an expert that the model has not.

    Raises:
        ValueError: with the setting to leave out.
    """
    if model.experts > 1:
        return
    if arguments.lora_2:
        raise ValueError(
            f"--lora-2 {arguments.lora_2[0]} is for a second expert, which {arguments.model} has not; use --lora"
        )
    if arguments.boundary_ratio is not None:
        raise ValueError(
            f"--boundary-ratio {arguments.boundary_ratio:g} is for a second expert, which {arguments.model} has "
            "not; leave --boundary-ratio out"
        )
    for name in SECOND_EXPERT:
        if getattr(arguments.sparse, name) not in (None, ()):
            flag = flag_of(FLAG_PREFIX + name)
            raise ValueError(f"{flag} is for a second expert, which {arguments.model} has not; use {flag[:-2]}")


def fill_defaults(arguments: GenerateArguments, model: WanModel) -> GenerateArguments:
    """The arguments with the model's own values for what they leave open; sizes follow the picture, where there is one, and
    of a video its length and frames a second, too.

    Raises:
        ValueError: a picture or video that cannot be read, or a video that is shorter than asked.
    """
    clip = None
    if arguments.video is not None:
        clip = look_at_clip(arguments.video, arguments.num_frames or model.defaults.num_frames)
        arguments = _filled_by_clip(arguments, clip, model)
    picture = None if clip is None else clip.size
    if arguments.image is not None:
        picture = picture_size(arguments.image)
    if picture is not None and (arguments.height is None or arguments.width is None):
        pixels = model.defaults.height * model.defaults.width
        height, width = size_for_picture(picture, arguments.height, arguments.width, pixels, model.spatial_multiple)
        arguments = replace(arguments, height=height, width=width)
    open_names = [name for name in vars(model.defaults) if getattr(arguments, name) is None]
    return replace(arguments, **{name: getattr(model.defaults, name) for name in open_names})


def _filled_by_clip(arguments: GenerateArguments, clip: Clip, model: WanModel) -> GenerateArguments:
    assert arguments.video is not None  # it was looked at
    multiple = model.temporal_multiple
    if arguments.num_frames is not None:
        check_clip_length("video", arguments.video, clip.frames, arguments.num_frames, multiple)
    num_frames = arguments.num_frames or (clip.frames - 1) // multiple * multiple + 1
    if arguments.mask is not None:
        has = look_at_clip(arguments.mask, num_frames, "mask").frames
        if has > 1:  # a picture is for all frames
            check_clip_length("mask", arguments.mask, has, num_frames, multiple)
    strength = STRENGTH if arguments.strength is None and model.takes_video else arguments.strength
    return replace(
        arguments,
        num_frames=num_frames,
        # A file that tells none is shown as the model's own videos are.
        fps=arguments.fps or (min(max(round(clip.fps), 1), _MOST_FPS) if clip.fps else None),
        strength=strength,
    )
