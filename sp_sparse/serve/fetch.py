"""Fetching from the web for a client, who must not reach what only this machine can reach."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin, urlsplit

import httpx

_REDIRECTS = 3


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
