"""First frames and fetching: what is read, and what must never be."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sp_sparse.serve import images
from sp_sparse.serve.answers import ApiError
from sp_sparse.serve.images import fetch, image_from_url, image_size, is_public, stored_image
from sp_sparse.serve.limits import Limits


def _encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(out, kind)
    return out.getvalue()


def _checked(data: bytes, width: int = 64, height: int = 64) -> bytes:
    image_size(data, Limits())
    return stored_image(data, width, height)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("PNG", "P")]
)
def test_images_become_png(kind: str, mode: str) -> None:
    data = _encoded(kind, mode)
    with (
        Image.open(io.BytesIO(_checked(data))) as image,
        Image.open(io.BytesIO(data)) as original,
    ):
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (20, 10))
        assert image.tobytes() == original.convert("RGB").tobytes()


def _decoded(data: bytes, width: int, height: int) -> Image.Image:
    with Image.open(io.BytesIO(_checked(data, width, height))) as image:
        return image.copy()


@pytest.mark.parametrize(("kind", "quality"), [("JPEG", 95), ("WEBP", 95), ("PNG", 0)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, quality: int, orientation: int) -> None:
    """A camera that was held aside says so in EXIF, and leaves the pixels as they are."""
    upright = Image.new("RGB", (40, 24), "black")
    upright.paste("red", (0, 0, 20, 12))
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    held = upright.transpose(Image.Transpose(undone[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    held.save(out, kind, exif=exif, **({"quality": quality} if quality else {}))
    image = _decoded(out.getvalue(), 64, 64)
    assert image.size == image_size(out.getvalue(), Limits()) == (40, 24)
    brightest = {(x, y): image.getpixel((x, y))[0] > 128 for x in (5, 35) for y in (4, 20)}  # type: ignore[index]
    assert brightest == {(5, 4): True, (5, 20): False, (35, 4): False, (35, 20): False}


@pytest.mark.parametrize(
    ("size", "video", "kept"),
    [
        ((64, 32), (64, 32), (64, 32)),
        ((20, 10), (64, 32), (20, 10)),  # not enlarged
        ((640, 320), (64, 32), (64, 32)),
        ((640, 640), (64, 32), (64, 64)),  # covers the video
        ((640, 160), (64, 32), (128, 32)),
        ((4000, 40), (64, 32), (905, 9)),  # within 4 x 64 x 32 pixels
        ((4000, 1), (64, 64), (4000, 1)),
    ],
)
def test_pictures_are_no_larger_than_their_video_needs(
    size: tuple[int, int], video: tuple[int, int], kept: tuple[int, int]
) -> None:
    assert _decoded(_encoded("PNG", size=size), *video).size == kept


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        _encoded("GIF", "L"),
        _encoded("TIFF"),
        _encoded("PNG")[:-30],
        _encoded("BMP"),
    ],
    ids=["empty", "text", "only a signature", "gif", "tiff", "cut off", "bmp"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ApiError, match="broken, or none of PNG, JPEG, WEBP") as error:
        _checked(data)
    assert error.value.status == 400


def test_data_urls() -> None:
    data = _encoded("PNG")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert asyncio.run(image_from_url(url, Limits())) == data
    for wrong in (
        "data:text/html;base64,aGk=",
        "data:image/svg+xml;base64,aGk=",
        "ftp://example.org/x.png",
        "x.png",
        "",
    ):
        with pytest.raises(ApiError, match="image_url must be"):
            asyncio.run(image_from_url(wrong, Limits(image_urls=True)))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fec0::1", False),
        ("feff:ffff::1", False),
        ("64:ff9b:1::a9fe:a9fe", False),  # IPv4 behind a translator of this network
        ("64:ff9b::808:808", True),
        ("::127.0.0.1", False),
        ("5f00::1", False),
        ("3fff::1", False),
        ("192.88.99.1", False),
        ("192.0.0.8", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/image":
            self._answer(200, b"bytes", {"X-Host": self.headers["Host"]})
        elif self.path == "/large":
            self._answer(200, b"x" * 5000, {})
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif self.path == "/nowhere":
            self._answer(302, b"", {})
        elif self.path.startswith("/to/"):
            self._answer(302, b"", {"Location": self.path[len("/to/") :]})
        else:
            self._answer(404, b"", {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # clients that leave

    server = Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _fetch(url: str, seconds: float = 30) -> bytes:
    return asyncio.run(fetch(url, 1000, seconds))


def test_private_addresses_are_not_fetched_from(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = site.rpartition(":")[2]
    for url in (f"{site}/image", f"http://localhost:{port}/image", f"http://[::ffff:127.0.0.1]:{port}/image"):
        with pytest.raises(ValueError, match="private networks"):
            _fetch(url)
    # Other spellings of 127.0.0.1 are one address too.
    for url in (f"http://2130706433:{port}/image", f"http://0x7f.1:{port}/image", f"http://127.1:{port}/image"):
        with pytest.raises(ValueError, match=r"private networks|gaierror"):
            _fetch(url)
    for url in (
        "file:///etc/passwd",
        "gopher://example.org",
        f"http://user:password@127.0.0.1:{port}/image",
        "http://",
    ):
        with pytest.raises(ValueError, match="only plain"):
            _fetch(url)


def test_fetching(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a public host: the one address of the test site counts as one."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    assert _fetch(f"{site}/image") == b"bytes"
    assert _fetch(f"{site}/to//image") == b"bytes"
    for path, text in (
        ("/large", "more than 1000 bytes"),
        ("/nothing", "answered 404"),
        ("/nowhere", "answered 302 without an address to go to"),
        ("/to//nowhere", "answered 302 without an address to go to"),
        ("/to//to//to//to//to//image", "more than 3 redirects"),
        ("/to/file:///etc/passwd", "only plain"),
        ("/to/http://127.0.0.2/x", "private networks"),
        ("/to/http://[::1]/x", "private networks"),
    ):
        with pytest.raises(ValueError, match=text):
            _fetch(site + path)
    with pytest.raises(ValueError, match="took more than"):
        _fetch(f"{site}/slow", 0.5)


def test_a_name_that_changes_its_mind_leads_nowhere_else(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was looked at: the name is looked up once."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    looked_up = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(host.decode() if isinstance(host, bytes) else host)
        return real(
            "127.0.0.1" if looked_up.count("rebinding.example.org") < 2 else "127.0.0.2", port, *arguments, **options
        )

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    port = site.rpartition(":")[2]
    assert _fetch(f"http://rebinding.example.org:{port}/image") == b"bytes"
    assert looked_up.count("rebinding.example.org") == 1


def test_images_by_address_only_where_allowed(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    assert asyncio.run(image_from_url(f"{site}/image", Limits(image_urls=True))) == b"bytes"
    with pytest.raises(ApiError, match="fetches nothing"):
        asyncio.run(image_from_url(f"{site}/image", Limits()))
