"""First frames: from a client's bytes or address to a PNG that every rank reads alike.

Nothing of the client's is opened by name, and no client reaches through this machine what only this machine can reach.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import math
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from sp_sparse.serve.answers import ApiError, invalid
from sp_sparse.serve.limits import Limits

P = ParamSpec("P")
T = TypeVar("T")

_REDIRECTS = 3

# Of EXIF: the tag, and its values for a camera that was held aside.
_ORIENTATION, _ASIDE = 0x0112, (5, 6, 7, 8)

_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,", re.IGNORECASE)

# A picture may have so many times the pixels of its video: one of another shape covers it and hangs over.
_OVERHANG = 4

# What Python's `ipaddress` takes for public in some versions: former anycast of 6to4, protocol assignments.
_NOT_PUBLIC_4 = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "192.0.0.0/24")))
# Of IPv6 only this is given out; of it, documentation.
_UNICAST_6, _DOCUMENTATION_6 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("3fff::/20")


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


class Decoders:
    """The few threads that decode images. Decoded images are large: only so many at once, and requests go on meanwhile."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def run(self, action: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do something with an image in one of the threads; others wait without holding anyone up."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(action, *arguments, **named))


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Width and height of the upright image, whose pixels are not looked at.

    Raises:
        ApiError: not an image of these formats, or too large.
    """
    with _opened(data) as image:
        width, height = image.size
        if width * height > limits.image_pixels:
            text = f"the image has {width}x{height} pixels; use {limits.image_pixels} in all at most"
            raise ApiError(413, text, "image_too_large", "input_reference")
        return (height, width) if image.getexif().get(_ORIENTATION) in _ASIDE else (width, height)


def stored_image(data: bytes, width: int, height: int) -> bytes:
    """The image upright as 8-bit RGB PNG, no larger than a video of `width` x `height` needs.

    Raises:
        ApiError: broken.
    """
    from PIL import Image, ImageOps

    with _opened(data) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        size = _needed_size(upright.size, (width, height))
        if size != upright.size:
            upright = upright.resize(size, Image.Resampling.LANCZOS)
        out = io.BytesIO()
        upright.save(out, "PNG", compress_level=1)
        return out.getvalue()


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `image_size` looks at the size
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                yield image
    except ApiError:
        raise
    except Exception as error:  # a decoder may raise anything on broken input
        raise invalid(f"the image is broken, or none of {', '.join(_FORMATS)}", "input_reference") from error


def _needed_size(size: tuple[int, int], video: tuple[int, int]) -> tuple[int, int]:
    """`size`, or less of the same shape that still covers a video, within `_OVERHANG` times its pixels."""
    scale = min(1.0, max(wanted / side for wanted, side in zip(video, size, strict=True)))
    scale = min(scale, math.sqrt(_OVERHANG * math.prod(video) / math.prod(size)))
    if scale == 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind a translator
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _UNICAST_6 or ip in _DOCUMENTATION_6:
            return False
    elif any(ip in network for network in _NOT_PUBLIC_4):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def fetch(url: str, max_bytes: int, seconds: float) -> bytes:
    """What lies at an http(s) address, following few redirects.

    Every address that the name stands for must be public, and the connection goes to one that was looked at, so that a
    name which changes its mind meanwhile leads nowhere else.

    Raises:
        ValueError: an address that is not fetched from, too large, too slow, or an error on the way.
    """
    try:
        return await asyncio.wait_for(_follow(url, max_bytes), seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise ValueError(f"it took more than {seconds:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise ValueError(type(error).__name__) from error


async def _follow(url: str, max_bytes: int) -> bytes:
    # No proxy of the environment: it would look the name up again. The bound is on the whole, not on each read.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client:
        for _ in range(_REDIRECTS + 1):
            redirect, body = await _get(client, url, max_bytes)
            if redirect is None:
                return body
            url = urljoin(url, redirect)
    raise ValueError(f"more than {_REDIRECTS} redirects")


async def _get(client: httpx.AsyncClient, url: str, max_bytes: int) -> tuple[str | None, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise ValueError("only plain http(s) addresses are fetched")
    address = await _public_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    pinned = httpx.URL(url).copy_with(host=address)
    headers = {"Host": parts.netloc, "Accept-Encoding": "identity"}
    async with client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": parts.hostname}) as response:
        if response.is_redirect:
            if "location" not in response.headers:
                raise ValueError(f"the server there answered {response.status_code} without an address to go to")
            return response.headers["location"], b""
        if response.status_code != 200:
            raise ValueError(f"the server there answered {response.status_code}")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"it has more than {max_bytes} bytes")
        return None, bytes(body)


async def _public_address(host: str, port: int) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ValueError("addresses of private networks are not fetched from")
    return addresses[0]
