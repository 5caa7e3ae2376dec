"""Finding a Wan model by name, folder or hub id, what it can make, and loading it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sp_sparse.config import FLAG_PREFIX, SECOND_EXPERT
from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import RANDOM_A14B, RANDOM_LAYERS, TINY_MODELS, GenerateArguments
from sp_sparse.generate.fits import (
    Named,
    check_frames,
    check_guidance,
    check_negative_prompt,
    check_side,
    size_for_picture,
)
from sp_sparse.generate.lora import load_lora
from sp_sparse.generate.mapped import mapped_pipeline
from sp_sparse.generate.mini import MINI, mini_folder
from sp_sparse.generate.placement import Placement, placement_of, wanted_dtype
from sp_sparse.generate.random_models import (
    TINY_POSITIONS,
    random_a14b,
    tiny_image_to_video,
    tiny_text_image_to_video,
    tiny_text_to_video,
)
from sp_sparse.generate.tiles import enable_tiling

_WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
_PIPELINE_MULTIPLE = 16  # diffusers' Wan pipelines refuse other sides, whatever the VAE


@dataclass(frozen=True)
class VideoDefaults:
    """What a model makes if nothing is asked for."""

    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float


# 8 x 8 x 5 = 320 tokens, 20 blocks of 16.
_TINY = VideoDefaults(128, 128, 17, 8, 4, 3.0)
# 16 x 16 x 13 = 3,328 tokens, 52 blocks of 64: what it was trained on.
_MINI = VideoDefaults(128, 128, 49, 16, 12, 3.0)
_A14B = VideoDefaults(480, 832, 81, 16, 40, 4.0)
_TI2V = VideoDefaults(704, 1280, 121, 24, 50, 5.0)


@dataclass(frozen=True)
class WanModel:
    """A model whose weights are not loaded yet.

    Attributes:
        defaults: sizes and settings for what the arguments leave open.
        takes_image: whether the video starts from an image.
        may_take_image: whether it could, from the same weights.
        draws_image: whether an image may be drawn where none is given.
        dtype: of the transformers, where the arguments leave it open.
        load: (device, dtype, placement) -> the diffusers pipeline. Where a placement is given its transformers are on the
            CPU, or placed already.
        experts: 2 where a second transformer takes over at low noise.
        spatial_multiple: heights and widths are multiples of it.
        temporal_multiple: numbers of frames are a multiple of it, plus one.
        positions: patches that a side, and latent frames that a video, may have at most.
        takes_flow_shift: whether the scheduler has a shift that it uses.
        places_blocks: whether `load` brings the blocks to their place as it makes them.
    """

    defaults: VideoDefaults
    takes_image: bool
    may_take_image: bool
    draws_image: bool
    dtype: torch.dtype
    load: Callable[[torch.device, torch.dtype, Placement | None], Any]
    experts: int = 2
    spatial_multiple: int = 16
    temporal_multiple: int = 4
    positions: int = 1024
    takes_flow_shift: bool = True
    places_blocks: bool = False


def find_model(arguments: GenerateArguments, device: torch.device) -> WanModel:
    """What `--model` names, without reading its weights.

    Raises:
        ValueError: nothing of that name, or nothing of the Wan family.
    """
    if arguments.model in TINY_MODELS:
        return _tiny(arguments)
    if arguments.model == RANDOM_A14B:
        load = partial(random_a14b, arguments.layers or RANDOM_LAYERS)
        return WanModel(_A14B, False, False, False, _large_dtype(device), load, places_blocks=True)
    if arguments.model == MINI:
        return replace(_pretrained(replace(arguments, model=str(mini_folder())), device), defaults=_MINI)
    return _pretrained(arguments, device)


def check_image(arguments: GenerateArguments, model: WanModel) -> None:
    """Refuse an image too many or too few.

    Raises:
        ValueError: with what the model takes.
    """
    if arguments.image is not None and not model.takes_image:
        raise ValueError(f"--image is given, but {arguments.model} makes videos from text alone; leave --image out")
    if arguments.image is None and model.takes_image and not model.draws_image:
        raise ValueError(f"{arguments.model} makes videos from an image; give its first frame with --image")
    if arguments.image is not None and not Path(arguments.image).is_file():
        raise ValueError(f"--image {arguments.image} is not a file; give a picture")
    if arguments.image is not None:
        picture_size(arguments.image)


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
    if arguments.num_frames > (most := (model.positions - 1) * model.temporal_multiple + 1):
        raise ValueError(
            f"{named('num_frames')} {arguments.num_frames} is above the {most} that {arguments.model} has places for; use "
            "fewer"
        )
    check_guidance(arguments.guidance_scale, arguments.guidance_scale_2, model.experts, arguments.model, named)
    check_negative_prompt(arguments.guidance_scale, arguments.negative_prompt, named)
    if arguments.flow_shift is not None and not model.takes_flow_shift:
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
    """The arguments with the model's own values for what they leave open; sizes follow the picture, where there is one."""
    if arguments.image is not None and (arguments.height is None or arguments.width is None):
        pixels = model.defaults.height * model.defaults.width
        height, width = size_for_picture(
            picture_size(arguments.image), arguments.height, arguments.width, pixels, model.spatial_multiple
        )
        arguments = replace(arguments, height=height, width=width)
    open_names = [name for name in vars(model.defaults) if getattr(arguments, name) is None]
    return replace(arguments, **{name: getattr(model.defaults, name) for name in open_names})


def picture_size(path: str) -> tuple[int, int]:
    """Width and height, as the picture is meant to be seen; all of it is read.

    Raises:
        ValueError: it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            size: tuple[int, int] = ImageOps.exif_transpose(image).size
            return size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} cannot be read ({error}); give a PNG, JPEG or WebP picture") from error


def load_pipeline(arguments: GenerateArguments, model: WanModel, device: torch.device) -> Any:
    """The pipeline on `device`, with LoRA weights, the boundary of the experts and the flow shift that were asked for."""
    dtype = wanted_dtype(arguments, model.dtype)
    placement = placement_of(arguments, device, dtype)
    pipe = model.load(device, dtype, placement)
    if placement is None:
        pipe.to(device)
        load_lora(pipe, arguments)
    else:
        load_lora(pipe, arguments)
        _place(pipe, model, placement)
    if arguments.vae_tiling:
        enable_tiling(pipe.vae)
    if arguments.boundary_ratio is not None:
        pipe.register_to_config(boundary_ratio=arguments.boundary_ratio)
    pipe.scheduler = fresh_scheduler(pipe.scheduler, arguments.flow_shift)
    return pipe


def _place(pipe: Any, model: WanModel, placement: Placement) -> None:
    pipe.vae.to(placement.device)
    if pipe.text_encoder is not None:
        placement.place_text_encoder(pipe.text_encoder)
    for transformer in transformers_of(pipe):
        if model.places_blocks:
            placement.finish(transformer)
        else:
            placement.place(transformer)


def fresh_scheduler(scheduler: Any, flow_shift: float | None) -> Any:
    """A scheduler of the same configuration that has seen no step, with the shift if one is given."""
    shift = {} if flow_shift is None else {_shift_name(scheduler) or "shift": flow_shift}
    return type(scheduler).from_config(scheduler.config, **shift)


def shift_of(scheduler: Any) -> float | None:
    """The shift of the noise schedule that the scheduler uses; None for one that uses none."""
    name = _shift_name(scheduler)
    return None if name is None else float(scheduler.config[name])


def _shift_name(scheduler: Any) -> str | None:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return None
    if "flow_shift" in config:
        return "flow_shift" if config.get("use_flow_sigmas") else None
    return "shift" if "shift" in config else None


def transformers_of(pipe: Any) -> list[Any]:
    """The one expert, or both."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [transformer for transformer in found if transformer is not None]


def _large_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _tiny(arguments: GenerateArguments) -> WanModel:
    from_image = arguments.model == "tiny-i2v" or (arguments.model == "tiny-ti2v" and arguments.image is not None)
    build: dict[str, Callable[[torch.dtype], Any]] = {
        "tiny": tiny_text_to_video,
        "tiny-i2v": tiny_image_to_video,
        "tiny-ti2v": lambda dtype: tiny_text_image_to_video(dtype, from_image),
    }
    defaults = _TINY
    experts, multiple = 2, 16
    if arguments.model == "tiny-ti2v":
        experts, multiple = 1, 32
        defaults = replace(_TINY, height=192, width=192)  # its VAE shrinks by 16: 6 x 6 x 5 = 180 tokens
    return WanModel(
        defaults=defaults,
        takes_image=from_image,
        may_take_image=from_image or arguments.model == "tiny-ti2v",
        draws_image=True,
        dtype=torch.float32,
        load=lambda device, dtype, placement: build[arguments.model](dtype),
        experts=experts,
        spatial_multiple=multiple,
        positions=TINY_POSITIONS,
    )


def _pretrained(arguments: GenerateArguments, device: torch.device) -> WanModel:
    index = _pipeline_index(arguments.model)
    name = index.get("_class_name")
    if name not in _WAN_PIPELINES:
        raise ValueError(
            f"{arguments.model} holds a {name}, which is not a Wan pipeline; use one of {', '.join(_WAN_PIPELINES)}"
        )
    per_token = bool(index.get("expand_timesteps"))
    # TI2V-5B is published as a WanPipeline and starts from an image in the other class.
    from_image = name == "WanImageToVideoPipeline" or (per_token and arguments.image is not None)
    class_name = "WanImageToVideoPipeline" if from_image else name

    def load(device: torch.device, dtype: torch.dtype, placement: Placement | None) -> Any:
        import diffusers

        pipeline = getattr(diffusers, class_name)
        # The VAE in float32, as the model's authors run it; straight to the device, since the CPU memory of a machine
        # does not hold the weights once a rank.
        dtypes = {"default": dtype, "vae": torch.float32}
        if placement is not None:
            return mapped_pipeline(pipeline, arguments.model, dtypes, device)
        return pipeline.from_pretrained(arguments.model, dtype=dtypes, device_map=device.type)

    vae, transformer = (_part_config(arguments.model, part) for part in ("vae", "transformer"))
    patch = transformer.get("patch_size", (1, 2, 2))
    has_second = (index.get("transformer_2") or [None])[0] is not None
    if has_second != (index.get("boundary_ratio") is not None):
        raise ValueError(
            f"model_index.json of {arguments.model} has boundary_ratio {index.get('boundary_ratio')} and "
            f"{'a' if has_second else 'no'} transformer_2; give a folder with both, or with neither"
        )
    return WanModel(
        defaults=_TI2V if per_token else _A14B,
        takes_image=from_image,
        may_take_image=from_image or per_token,
        draws_image=False,
        dtype=_large_dtype(device),
        load=load,
        experts=2 if has_second else 1,
        spatial_multiple=math.lcm(
            _PIPELINE_MULTIPLE, *(vae.get("scale_factor_spatial", 8) * side for side in patch[1:])
        ),
        temporal_multiple=vae.get("scale_factor_temporal", 4),
        positions=transformer.get("rope_max_seq_len", 1024),
        takes_flow_shift=_takes_flow_shift(arguments.model, index),
    )


def _part_config(model: str, part: str) -> dict[str, Any]:
    """`<part>/config.json`; what it leaves out is as diffusers has it."""
    import diffusers

    kind: Any = diffusers.AutoencoderKLWan if part == "vae" else diffusers.WanTransformer3DModel
    try:
        config: dict[str, Any] = kind.load_config(model, subfolder=part)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{part}/config.json of {model} cannot be read ({str(error).splitlines()[0]}); give the whole folder of a Wan "
            "pipeline, such as save_pretrained writes"
        ) from error
    return config


def _takes_flow_shift(model: str, index: dict[str, Any]) -> bool:
    import diffusers

    kind: Any = getattr(diffusers, str((index.get("scheduler") or [None, None])[1]), None)
    if kind is None:
        raise ValueError(
            f"model_index.json of {model} names no scheduler of diffusers; give the folder of a Wan pipeline"
        )
    try:
        scheduler = kind.from_pretrained(model, subfolder="scheduler")  # it has a configuration alone
    except (OSError, ValueError) as error:
        raise ValueError(
            f"scheduler/scheduler_config.json of {model} cannot be read ({str(error).splitlines()[0]}); give the whole "
            "folder of a Wan pipeline, such as save_pretrained writes"
        ) from error
    return _shift_name(scheduler) is not None


def _pipeline_index(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    if Path(model).is_dir() and not Path(model, "model_index.json").is_file():
        raise ValueError(
            f"{model} has no model_index.json, so it is no diffusers pipeline; give the folder of a Wan pipeline, such as "
            "save_pretrained writes"
        )
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model} is neither {', '.join((*TINY_MODELS, RANDOM_A14B))}, nor a folder, nor a hub id that can be "
            f"reached: {str(error).splitlines()[0]}"
        ) from error
    return index
