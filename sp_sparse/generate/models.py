"""Finding a Wan model by name, folder or hub id, and loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sp_sparse.generate.arguments import RANDOM_A14B, TINY_MODELS, GenerateArguments
from sp_sparse.generate.random_models import (
    random_a14b,
    tiny_image_to_video,
    tiny_text_image_to_video,
    tiny_text_to_video,
)

_WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


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
        load: (device, dtype) -> the diffusers pipeline.
    """

    defaults: VideoDefaults
    takes_image: bool
    may_take_image: bool
    draws_image: bool
    dtype: torch.dtype
    load: Callable[[torch.device, torch.dtype], Any]


def find_model(arguments: GenerateArguments, device: torch.device) -> WanModel:
    """What `--model` names, without reading its weights.

    Raises:
        ValueError: nothing of that name, or nothing of the Wan family.
    """
    if arguments.model in TINY_MODELS:
        return _tiny(arguments)
    if arguments.model == RANDOM_A14B:
        load = partial(random_a14b, arguments.layers)
        return WanModel(_A14B, False, False, False, _large_dtype(device), load)
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
        raise ValueError(f"--image {arguments.image} is not a file")


def fill_defaults(arguments: GenerateArguments, model: WanModel) -> GenerateArguments:
    """The arguments with the model's own values for what they leave open."""
    open_names = [name for name in vars(model.defaults) if getattr(arguments, name) is None]
    return replace(arguments, **{name: getattr(model.defaults, name) for name in open_names})


def load_pipeline(arguments: GenerateArguments, model: WanModel, device: torch.device) -> Any:
    """The pipeline on `device`, with LoRA weights and the flow shift that were asked for."""
    dtype = model.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    pipe = model.load(device, dtype).to(device)
    for name, path in (("transformer", arguments.lora), ("transformer_2", arguments.lora_2)):
        if path is None:
            continue
        if getattr(pipe, name, None) is None:
            raise ValueError(f"--lora-2 {path} is for a second expert, which {arguments.model} has not; use --lora")
        pipe.load_lora_weights(path, load_into_transformer_2=name == "transformer_2")
    pipe.scheduler = fresh_scheduler(pipe.scheduler, arguments.flow_shift)
    return pipe


def fresh_scheduler(scheduler: Any, flow_shift: float | None) -> Any:
    """A scheduler of the same configuration that has seen no step, with the shift if one is given."""
    shift = {} if flow_shift is None else {"flow_shift" if "flow_shift" in scheduler.config else "shift": flow_shift}
    return type(scheduler).from_config(scheduler.config, **shift)


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
    if arguments.model == "tiny-ti2v":
        defaults = replace(_TINY, height=192, width=192)  # its VAE shrinks by 16: 6 x 6 x 5 = 180 tokens
    may = from_image or arguments.model == "tiny-ti2v"
    return WanModel(defaults, from_image, may, True, torch.float32, lambda device, dtype: build[arguments.model](dtype))


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

    def load(device: torch.device, dtype: torch.dtype) -> Any:
        import diffusers

        pipeline = getattr(diffusers, class_name)
        # The VAE in float32, as the model's authors run it; straight to the device, since the CPU memory of a machine
        # does not hold the weights once a rank.
        dtypes = {"default": dtype, "vae": torch.float32}
        return pipeline.from_pretrained(arguments.model, dtype=dtypes, device_map=device.type)

    defaults = _TI2V if per_token else _A14B
    return WanModel(defaults, from_image, from_image or per_token, False, _large_dtype(device), load)


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
