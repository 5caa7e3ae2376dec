"""Reading a request for a video: JSON, or a form with the first frame as a file."""

from __future__ import annotations

from tempfile import gettempdir
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from sp_sparse.serve.answers import ApiError, invalid
from sp_sparse.serve.disk import NoRoomError, is_no_room
from sp_sparse.serve.requests import VideoRequest

_JSON, _FORM = "application/json", "multipart/form-data"
_IMAGE_NAMES = ("input_reference", "image_reference")


def request_body() -> dict[str, Any]:
    """The `requestBody` of the OpenAPI document."""
    schema = VideoRequest.model_json_schema()
    reference = schema.pop("$defs")["ImageReference"]
    for name in _IMAGE_NAMES:
        field = schema["properties"][name]
        field["anyOf"] = [reference if "$ref" in choice else choice for choice in field["anyOf"]]
    form = {
        "type": "object",
        "additionalProperties": False,
        "required": schema["required"],
        "properties": {
            **{name: _of_form(field) for name, field in schema["properties"].items() if name not in _IMAGE_NAMES},
            "input_reference": {"type": "string", "format": "binary", "description": "First frame: PNG, JPEG or WebP."},
        },
    }
    return {"required": True, "content": {_JSON: {"schema": schema}, _FORM: {"schema": form}}}


def _of_form(field: dict[str, Any]) -> dict[str, Any]:
    """A form has no null."""
    choices = [choice for choice in field.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) != 1:
        return field
    return {**choices[0], "description": field.get("description", "")}


async def read_request(request: Request) -> tuple[VideoRequest, bytes | None]:
    """What is asked for, and the image file if the form has one.

    Raises:
        ApiError: neither JSON nor a form, or not what the schema says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == _JSON:
            # Not `request.body()`, which would keep it as long as the request is answered.
            return VideoRequest.model_validate_json(b"".join([piece async for piece in request.stream()])), None
        if kind == _FORM:
            values, image = await _read_form(request)
            return VideoRequest.model_validate(values), image
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise invalid(f"{name}: {first['msg']}" if name else first["msg"], name or None) from error
    raise ApiError(415, f"content type {kind!r} is not read; send {_JSON} or {_FORM}", "unsupported_media_type")


async def _read_form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    values: dict[str, Any] = {}
    image = None
    try:
        async with request.form(max_files=1, max_fields=len(VideoRequest.model_fields) + 2) as form:
            for name, value in form.multi_items():
                if name in values or (image is not None and name in _IMAGE_NAMES):
                    raise invalid(f"{name} is given twice", name)
                if isinstance(value, UploadFile):
                    if name not in _IMAGE_NAMES:
                        raise invalid(f"{name} is no file; send it as text", name)
                    image = await value.read()
                elif name.endswith("[image_url]"):
                    values[name.removesuffix("[image_url]")] = {"image_url": value}
                else:
                    values[name] = value
    except OSError as error:  # files of forms lie on the disk until they are read
        if is_no_room(error):
            raise NoRoomError(f"the disk of {gettempdir()} is full ({error}); make room there") from error
        raise
    except (ValueError, KeyError) as error:  # such as a charset that is not one
        raise invalid("the form cannot be read") from error
    return values, image
