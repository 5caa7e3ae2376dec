"""Finding a Wan model by name, folder or hub id, what it can make, and loading it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sp_sparse.generate import defaults
from sp_sparse.generate.arguments import RANDOM_A14B, RANDOM_LAYERS, STAND_INS, TINY_MODELS, GenerateArguments
from sp_sparse.generate.defaults import VideoDefaults, defaults_of
from sp_sparse.generate.lora import load_lora
from sp_sparse.generate.mapped import mapped_pipeline
from sp_sparse.generate.memory import LOAD, says_what_helps
from sp_sparse.generate.mini import MINI, mini_folder
from sp_sparse.generate.offload import offload
from sp_sparse.generate.placement import Placement, placement_of, wanted_dtype
from sp_sparse.generate.random_models import (
    TINY_POSITIONS,
    random_stand_in,
    tiny_image_to_video,
    tiny_text_image_to_video,
    tiny_text_to_video,
    tiny_vace,
    tiny_wan_2_1,
    tiny_wan_2_1_image,
)
from sp_sparse.generate.real_sizes import T2V_A14B, TI2V_5B
from sp_sparse.generate.tiles import enable_tiling

_TEXT, _IMAGE, _VIDEO = "WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"
_CONTROL = "WanVACEPipeline"
_WAN_PIPELINES = (_TEXT, _IMAGE, _VIDEO, _CONTROL)
# Of the family, but with inputs that have no flags here.
_LIBRARY_ALONE = ("WanAnimatePipeline",)
_PIPELINE_MULTIPLE = 16  # diffusers' Wan pipelines refuse other sides, whatever the VAE


@dataclass(frozen=True)
class WanModel:
    """A model whose weights are not loaded yet.

    Attributes:
        defaults: sizes and settings for what the arguments leave open.
        takes_image: whether the video starts from an image.
        may_take_image: whether it could, from the same weights.
        draws_image: whether an image may be drawn where none is given.
        dtype: of the transformers, where the arguments leave it open.
        load: (device, dtype, placement) -> the diffusers pipeline, its weights on `device`. Where a placement is given its
            transformers are on the CPU, or placed already.
        experts: 2 where a second transformer takes over at low noise.
        spatial_multiple: heights and widths are multiples of it.
        temporal_multiple: numbers of frames are a multiple of it, plus one.
        positions: patches that a side, and latent frames that a video, may have at most.
        takes_flow_shift: whether the scheduler has a shift that it uses.
        takes_last_image: whether the video may end in an image, too.
        needs_last_image: whether it must.
        takes_video: whether it is loaded to make a video into another.
        takes_control: whether a video, a mask and reference images may control it: VACE.
        heads: of a layer's self-attention.
        layers: of each expert.
        token_pixels: side of a token, in pixels.
        places_blocks: whether `load` brings the blocks and the text encoder to their place as it makes them.
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
    takes_last_image: bool = False
    needs_last_image: bool = False
    takes_video: bool = False
    takes_control: bool = False
    places_blocks: bool = False
    heads: int = 40
    layers: int = 40
    token_pixels: int = 16


def find_model(arguments: GenerateArguments, device: torch.device) -> WanModel:
    """What `--model` names, without reading its weights.

    Raises:
        ValueError: nothing of that name, or nothing of the Wan family.
    """
    if arguments.model in TINY_MODELS:
        return _tiny(arguments)
    if arguments.model in STAND_INS:
        return _stand_in(arguments, device)
    if arguments.model == MINI:
        return replace(_pretrained(replace(arguments, model=str(mini_folder())), device), defaults=defaults.MINI)
    return _pretrained(arguments, device)


def load_pipeline(arguments: GenerateArguments, model: WanModel, device: torch.device) -> Any:
    """The pipeline on `device`, with LoRA weights, the boundary of the experts, the scheduler and its shift as asked; with
    `--offload` its weights wait for their turn in the CPU's memory.

    Raises:
        NotEnoughMemoryError: it has no room there.
    """
    dtype = wanted_dtype(arguments, model.dtype)
    waits = arguments.offload != "none"
    home = torch.device("cpu") if waits else device
    with says_what_helps(arguments.memory, LOAD):
        placement = placement_of(arguments, device, dtype)
        pipe = model.load(home, dtype, placement)
        if placement is None:
            pipe.to(home)
            load_lora(pipe, arguments)
        else:
            load_lora(pipe, arguments)
            _place(pipe, model, placement, home)
        if waits:
            offload(pipe, arguments, device)
    if arguments.vae_tiling:
        enable_tiling(pipe.vae)
    if arguments.boundary_ratio is not None:
        pipe.register_to_config(boundary_ratio=arguments.boundary_ratio)
    if arguments.scheduler != "model":
        from sp_sparse.generate.schedulers import named_scheduler  # here, for diffusers is slow to import

        pipe.scheduler = named_scheduler(arguments.scheduler, shift_of(pipe.scheduler) or 1.0)
    pipe.scheduler = fresh_scheduler(pipe.scheduler, arguments.flow_shift)
    return pipe


def _place(pipe: Any, model: WanModel, placement: Placement, home: torch.device) -> None:
    """Bring each part to its place, the transformers one after another; then `home`, where that is another device."""
    transformers = transformers_of(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part not in transformers and part is not pipe.text_encoder:
            part.to(home)
    if pipe.text_encoder is not None and not model.places_blocks:
        if home == placement.device:
            placement.place_text_encoder(pipe.text_encoder)
        else:
            pipe.text_encoder.to(home)
    for transformer in transformers:
        if model.places_blocks:
            placement.finish(transformer)
        else:
            placement.place(transformer)
        if home != placement.device:
            transformer.to(home)


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
    name = arguments.model
    from_image = name in ("tiny-i2v", "tiny-2.1-i2v") or (name == "tiny-ti2v" and arguments.image is not None)
    is_ti2v = name == "tiny-ti2v"
    experts = 2 if name in ("tiny", "tiny-i2v") else 1
    from_video = arguments.video is not None and name == "tiny-2.1"
    build: dict[str, Callable[[torch.dtype], Any]] = {
        "tiny": tiny_text_to_video,
        "tiny-i2v": tiny_image_to_video,
        "tiny-ti2v": lambda dtype: tiny_text_image_to_video(dtype, from_image),
        "tiny-2.1": lambda dtype: tiny_wan_2_1(dtype, from_video),
        "tiny-2.1-i2v": tiny_wan_2_1_image,
        "tiny-vace": tiny_vace,
    }
    return WanModel(
        defaults=defaults.TINY_TI2V if is_ti2v else defaults.TINY,
        takes_image=from_image,
        may_take_image=from_image or is_ti2v,
        draws_image=True,
        dtype=torch.float32,
        load=lambda device, dtype, placement: build[name](dtype),
        experts=experts,
        spatial_multiple=32 if is_ti2v else 16,
        positions=TINY_POSITIONS,
        takes_last_image=name == "tiny-i2v",
        takes_video=from_video,
        takes_control=name == "tiny-vace",
        heads=6 if is_ti2v else 8,
        layers=3 if name == "tiny-vace" else 2,
        token_pixels=32 if is_ti2v else 16,
    )


def _stand_in(arguments: GenerateArguments, device: torch.device) -> WanModel:
    layers, dtype = arguments.layers or RANDOM_LAYERS, _large_dtype(device)
    if arguments.model == RANDOM_A14B:
        load = partial(random_stand_in, T2V_A14B, layers, arguments.full, False, device)
        return WanModel(defaults.T2V_A14B, False, False, False, dtype, load, places_blocks=True, layers=layers)
    from_image = arguments.image is not None
    return WanModel(
        defaults=defaults.TI2V_5B,
        takes_image=from_image,
        may_take_image=True,
        draws_image=False,
        dtype=dtype,
        load=partial(random_stand_in, TI2V_5B, layers, arguments.full, from_image, device),
        experts=TI2V_5B.experts,
        spatial_multiple=32,
        places_blocks=True,
        heads=TI2V_5B.transformer["num_attention_heads"],
        layers=layers,
        token_pixels=32,
    )


def _pretrained(arguments: GenerateArguments, device: torch.device) -> WanModel:
    index = _pipeline_index(arguments.model)
    name = index.get("_class_name")
    if name in _LIBRARY_ALONE:
        raise ValueError(
            f"{arguments.model} holds a {name}, whose inputs have no flags here; load it with diffusers, and make it sparse "
            "by sp_sparse.integrations.diffusers.enable_sparse_attention(pipe, config, mesh), as docs/family.md shows"
        )
    if name not in _WAN_PIPELINES:
        raise ValueError(
            f"{arguments.model} holds a {name}, which is not a Wan pipeline; use one of {', '.join(_WAN_PIPELINES)}"
        )
    per_token = bool(index.get("expand_timesteps"))
    # TI2V-5B is published as a WanPipeline and starts from an image in the other class.
    from_image = name == _IMAGE or (per_token and arguments.image is not None)
    is_vace = name == _CONTROL
    # As the model's authors run them.
    exact = [part for part in ("vae", "image_encoder") if (index.get(part) or [None])[0] is not None]

    def load(device: torch.device, dtype: torch.dtype, placement: Placement | None) -> Any:
        import diffusers

        class_name = _CONTROL if is_vace else _VIDEO if from_video else _IMAGE if from_image else _TEXT
        pipeline = getattr(diffusers, class_name)
        # Straight to the device, since the CPU memory of a machine does not hold the weights once a rank.
        dtypes = {"default": dtype, **dict.fromkeys(exact, torch.float32)}
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
    experts, scale = 2 if has_second else 1, vae.get("scale_factor_spatial", 8)
    # That loop runs one expert, and takes its VAE to shrink by 8.
    from_video = arguments.video is not None and not (from_image or is_vace) and experts == 1 and scale == 8
    # Wan 2.1 embeds its images, in as many places as the weights have; Wan 2.2 does not.
    embeds_images = transformer.get("image_dim") is not None
    two_images = from_image and embeds_images and transformer.get("pos_embed_seq_len") is not None
    return WanModel(
        defaults=defaults_of(from_image, per_token, experts, two_images),
        takes_image=from_image,
        may_take_image=from_image or per_token,
        draws_image=False,
        dtype=_large_dtype(device),
        load=load,
        experts=experts,
        spatial_multiple=math.lcm(_PIPELINE_MULTIPLE, *(scale * side for side in patch[1:])),
        heads=transformer.get("num_attention_heads", 40),
        layers=transformer.get("num_layers", 40),
        token_pixels=scale * patch[1],
        temporal_multiple=vae.get("scale_factor_temporal", 4),
        positions=transformer.get("rope_max_seq_len", 1024),
        takes_flow_shift=_takes_flow_shift(arguments.model, index),
        takes_last_image=two_images or (from_image and not embeds_images and not per_token),
        needs_last_image=two_images,
        takes_video=from_video,
        takes_control=is_vace,
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
            f"--model {model} is neither {', '.join((MINI, *TINY_MODELS, *STAND_INS))}, nor a folder, nor a hub id that "
            f"can be reached: {str(error).splitlines()[0]}"
        ) from error
    return index
