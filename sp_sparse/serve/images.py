"""First frames: from a client's bytes to a PNG that every rank reads alike. Nothing of the client's is opened by name."""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
import warnings

from sp_sparse.serve.errors import ApiError, invalid
from sp_sparse.serve.fetch import fetch
from sp_sparse.serve.limits import Limits

_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,", re.IGNORECASE)

# Decoded images are large: only so many at once.
_DECODING = threading.BoundedSemaphore(2)


async def image_from_url(url: str, limits: Limits) -> bytes:
    """The bytes behind a `data:` address, or an http(s) one where that is allowed.

    Raises:
        ApiError: an address that is not read, or nothing to be had there.
    """
    prefix = _DATA_URL.match(url)
    if prefix:
        try:
            return base64.b64decode(url[prefix.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid("image_url is no base64", "input_reference") from error
    if re.match(r"https?://", url, re.IGNORECASE) and limits.image_urls:
        try:
            return await fetch(url, limits.body_bytes, limits.fetch_s)
        except ValueError as error:
            raise invalid(f"the image cannot be fetched: {error}", "input_reference") from error
    text = "image_url must be data:image/png;base64,… (or jpeg, webp)"
    raise invalid(text + (", or http(s)" if limits.image_urls else "; this server fetches nothing"), "input_reference")


def checked_image(data: bytes, limits: Limits) -> bytes:
    """The image as 8-bit RGB PNG.

    Raises:
        ApiError: not an image of these formats, broken, or too large.
    """
    from PIL import Image

    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > limits.image_pixels:
                    text = f"the image has {width}x{height} pixels; use {limits.image_pixels} in all at most"
                    raise ApiError(413, text, "image_too_large", "input_reference")
                out = io.BytesIO()
                image.convert("RGB").save(out, "PNG", compress_level=1)
                return out.getvalue()
    except ApiError:
        raise
    except Exception as error:  # a decoder may raise anything on broken input
        raise invalid(f"the image is broken, or none of {', '.join(_FORMATS)}", "input_reference") from error
