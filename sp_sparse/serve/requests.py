"""What clients may ask for, and what a job is made of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sp_sparse.generate.fits import check_frames, check_guidance, check_negative_prompt, check_side, size_for_picture
from sp_sparse.serve.answers import ApiError, invalid
from sp_sparse.serve.backend import IMAGE_NEVER, IMAGE_REQUIRED, JobParameters, ModelCard
from sp_sparse.serve.limits import Limits

_LARGEST = 10_000_000
_SEEDS = 2**53 - 1  # what JSON carries everywhere

Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class ImageReference(BaseModel):
    """The first frame of the video."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(
        description="`data:image/png;base64,…` (or jpeg, webp); an http(s) address only where the server allows it"
    )


class VideoRequest(BaseModel):
    """A video to make. What is left out is as the model wants it."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="What to show.")
    model: str | None = Field(None, description="The name that `/v1/models` gives; any other is refused.")
    seconds: float | None = Field(
        None,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Length; rounded to a number of frames the model can make.",
    )
    size: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$",
        description="Width x height in pixels; if left out, a first frame's aspect holds.",
    )
    width: Count | None = Field(None, description="Pixels; instead of `size`.")
    height: Count | None = Field(None, description="Pixels; instead of `size`.")
    num_frames: Count | None = Field(None, description="Frames, 4n + 1; instead of `seconds`.")
    fps: int | None = Field(None, ge=1, le=120, description="Frames a second.")
    num_inference_steps: Count | None = Field(None, description="Denoising steps.")
    seed: int | None = Field(None, ge=0, le=_SEEDS, description="Of the noise; drawn and told if left out.")
    guidance_scale: Guidance | None = Field(None, ge=1, description="Classifier-free guidance; 1 switches it off.")
    guidance_scale_2: Guidance | None = Field(None, description="Guidance of the second (low-noise) expert.")
    flow_shift: float | None = Field(
        None, gt=0, le=100, allow_inf_nan=False, description="Shift of the noise schedule."
    )
    negative_prompt: str = Field("", description="What to keep away from.")
    input_reference: ImageReference | None = Field(
        None, description="First frame, for models that take one; in a form also as a file."
    )
    image_reference: ImageReference | None = Field(None, description="The same as `input_reference`.")
    sparse_attn_backend: str | None = Field(
        None, min_length=1, max_length=200, description="`none` for dense attention, or the server's own kernel."
    )
    sparse_attn_topk: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="Share of key blocks kept, for all experts; 1 is dense."
    )
    sparse_attn_schedule: Literal["constant", "conservative", "aggressive"] | None = Field(
        None, description="Density over layers and steps."
    )
    user: str | None = Field(None, max_length=1000, description="Taken for compatibility and not used.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        """Refuse true and false, of which pydantic would make the numbers 1 and 0."""
        if isinstance(value, bool):
            raise ValueError("true and false are no values of it; give a number or text, or leave it out")
        return value

    def image_url(self) -> str | None:
        """The address of the first frame, under whichever name it came.

        Raises:
            ApiError: it came under both.
        """
        if self.input_reference and self.image_reference:
            raise invalid("input_reference and image_reference are the same; give one", "image_reference")
        reference = self.input_reference or self.image_reference
        return None if reference is None else reference.image_url


def job_parameters(
    request: VideoRequest, picture: tuple[int, int] | None, card: ModelCard, limits: Limits
) -> JobParameters:
    """The job of a request, with the model's values for what it leaves open; without its image, of which `picture` is the
    width and height.

    Raises:
        ApiError: something that this model cannot make, or more than the limits allow.
    """
    if request.model not in (None, card.name):
        raise ApiError(404, f"model {request.model!r} is not here; this server has {card.name!r}", "model_not_found")
    width, height = _size(request, picture, card)
    fps = request.fps or card.fps
    frames = _frames(request, card, fps)
    steps = request.num_inference_steps or card.num_inference_steps
    _check_limits(request, limits, width, height, frames, steps)
    _check_image(picture, card)
    experts = 2 if card.two_experts else 1
    _refusing(
        "guidance_scale_2",
        lambda: check_guidance(request.guidance_scale, request.guidance_scale_2, experts, card.name, str),
    )
    scale = card.guidance_scale if request.guidance_scale is None else request.guidance_scale
    _refusing("negative_prompt", lambda: check_negative_prompt(scale, request.negative_prompt, str))
    _check_sparse(request, card)
    return JobParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
        num_frames=frames,
        fps=fps,
        num_inference_steps=steps,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        guidance_scale=scale,
        guidance_scale_2=request.guidance_scale_2,
        flow_shift=request.flow_shift,
        sparse_backend=request.sparse_attn_backend,
        sparse_topk=request.sparse_attn_topk,
        sparse_schedule=request.sparse_attn_schedule,
    )


def _refusing(param: str, check: Callable[[], None]) -> None:
    """Tell the client what a check of `generate` refuses."""
    try:
        check()
    except ValueError as error:
        raise invalid(str(error), param) from error


def _size(request: VideoRequest, picture: tuple[int, int] | None, card: ModelCard) -> tuple[int, int]:
    width, height = request.width, request.height
    if request.size is not None:
        if width is not None or height is not None:
            raise invalid("size and width or height are both given; use one", "size")
        width, height = map(int, request.size.split("x"))
    unit = card.pixel_multiple
    if picture is not None and (width is None or height is None):
        height, width = size_for_picture(picture, height, width, card.height * card.width, unit)
    width, height = width or card.width, height or card.height
    for name, pixels in (("width", width), ("height", height)):
        _refusing("size", partial(check_side, name, pixels, unit, str))
    return width, height


def _frames(request: VideoRequest, card: ModelCard, fps: int) -> int:
    unit = card.frame_multiple
    if request.num_frames is not None:
        if request.seconds is not None:
            raise invalid("num_frames and seconds are both given; use one", "num_frames")
        _refusing("num_frames", partial(check_frames, request.num_frames, unit, str))
        return request.num_frames
    return card.num_frames if request.seconds is None else round(request.seconds * fps / unit) * unit + 1


def _check_limits(request: VideoRequest, limits: Limits, width: int, height: int, frames: int, steps: int) -> None:
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > limits.prompt_characters:
            raise invalid(f"{name} has {len(text)} characters; use {limits.prompt_characters} at most", name)
    for name, value, most in (
        ("size", width * height, limits.pixels),
        ("num_frames", frames, limits.frames),
        ("num_inference_steps", steps, limits.steps),
    ):
        if value > most:
            what = f"{width}x{height} = {value} pixels" if name == "size" else f"{name} {value}"
            raise invalid(f"{what} is above this server's limit of {most}; use less", name, "limit_exceeded")
    work = width * height * frames * steps
    if work > limits.work:
        raise invalid(
            f"{width}x{height} x {frames} frames x {steps} steps = {work} is above this server's limit of {limits.work}; "
            "use fewer pixels, frames or steps",
            code="limit_exceeded",
        )


def _check_image(picture: tuple[int, int] | None, card: ModelCard) -> None:
    if picture is None and card.image == IMAGE_REQUIRED:
        raise invalid(f"{card.name} makes videos from an image; give it as input_reference", "input_reference")
    if picture is not None and card.image == IMAGE_NEVER:
        raise invalid(f"{card.name} makes videos from text alone; leave input_reference out", "input_reference")


def _check_sparse(request: VideoRequest, card: ModelCard) -> None:
    backend, others = request.sparse_attn_backend, request.sparse_attn_topk or request.sparse_attn_schedule
    if backend not in (None, "none", card.sparse_backend):
        text = f"sparse_attn_backend {backend!r} is not this server's; use {card.sparse_backend!r}, or 'none' for dense"
        raise invalid(text, "sparse_attn_backend")
    if backend == "none" and others:
        raise invalid("sparse_attn_backend 'none' is dense; leave topk and schedule out", "sparse_attn_backend")
    if card.sparse_backend == "none" and others:
        raise invalid(
            "this server was started without sparse attention; leave topk and schedule out", "sparse_attn_topk"
        )
