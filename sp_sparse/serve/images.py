"""First frames: from a client's bytes or address to a PNG that every rank reads alike.

Nothing of the client's is opened by name, and no client reaches through this machine what only this machine can reach.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
import threading
import warnings
from urllib.parse import urljoin, urlsplit

import httpx

from sp_sparse.serve.answers import ApiError, invalid
from sp_sparse.serve.limits import Limits

_REDIRECTS = 3

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


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 behind a translator
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
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
