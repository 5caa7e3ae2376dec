"""The HTTP interface, with a backend that needs no model."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import wait_for
from tests.serving.fake import LocalServer

UNKNOWN = "video_" + "0" * 32


def _is_at(server: LocalServer, job: str, step: int) -> bool:
    told = server.get(job)
    return bool(told["phase"] == "denoise" and told["step"] == step)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(tmp_path / "data") as started:
        yield started


def _refused(answer: httpx.Response, status: int, code: str, text: str = "") -> dict[str, Any]:
    """The error, in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert text in error["message"]
    assert "Traceback" not in answer.text
    return dict(error)


def _raw(server: LocalServer, data: bytes, seconds: float = 30) -> bytes:
    """What comes back for these bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        pieces = []
        while piece := connection.recv(65536):
            pieces.append(piece)
        return b"".join(pieces)


def test_openai_client(server: LocalServer, tmp_path: Path) -> None:
    """The official client creates, polls, lists, downloads and deletes."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    video = client.videos.create_and_poll(
        model="fake/model",  # type: ignore[arg-type]
        prompt="a cat",
        size="64x32",  # type: ignore[arg-type]
        seconds="4",
        poll_interval_ms=20,
        extra_body={"seed": 5, "sparse_attn_topk": 0.2},
    )
    assert (video.status, video.progress, video.size) == ("completed", 100, "64x32")
    assert video.model_extra is not None
    assert (video.model_extra["seed"], video.model_extra["num_frames"]) == (5, 33)
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == b"video 5 a cat 0"
    assert [listed.id for listed in client.videos.list(limit=1)] == [video.id]
    assert client.models.list().data[0].id == client.models.retrieve("fake/model").id == "fake/model"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="multiples of 16"):
        client.videos.create(prompt="a cat", size="65x32")  # type: ignore[arg-type]


def test_openai_client_sends_an_image(server: LocalServer, tmp_path: Path) -> None:
    import openai
    from PIL import Image

    Image.new("RGB", (20, 10), "teal").save(tmp_path / "first.jpg")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    video = client.videos.create_and_poll(prompt="a cat", input_reference=tmp_path / "first.jpg", poll_interval_ms=20)
    size = int(server.content(video.id).split()[-1])
    assert size > 60


def test_progress_of_a_job(server: LocalServer) -> None:
    job, later = server.create(prompt="wait")["id"], server.create(prompt="wait")["id"]
    seen = []
    for steps in range(3):
        wait_for(partial(_is_at, server, job, steps))
        told = server.get(job)
        assert told["status"] == "in_progress"
        seen.append(told["progress"])
        assert server.get(later)["jobs_ahead"] == 1
        server.steps(1)
    assert seen == [2, 31, 60]
    done = server.ended(job)
    assert (done["progress"], done["density"], done["kernel_calls"]) == (100, 0.5, {"fake": 1})
    server.steps(3)
    # The second of a size knows how long decoding and saving take.
    assert server.ended(later)["eta_s"] is None


def test_pages(server: LocalServer) -> None:
    ids = [server.completed(seed=seed)["id"] for seed in range(5)]
    newest = server.http.get("/v1/videos", params={"limit": 2}).json()
    assert [job["id"] for job in newest["data"]] == ids[:-3:-1]
    assert newest["has_more"]
    assert (newest["first_id"], newest["last_id"]) == (ids[4], ids[3])
    rest = server.http.get("/v1/videos", params={"after": newest["last_id"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    oldest = server.http.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
    assert oldest["data"][0]["id"] == ids[0]
    for parameters in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": UNKNOWN}, {"after": "x"}):
        assert server.http.get("/v1/videos", params=parameters).status_code == 400


def test_sync(server: LocalServer) -> None:
    answer = server.http.post("/v1/videos/sync", json={"prompt": "a cat", "seed": 1})
    assert (answer.status_code, answer.content) == (200, b"video 1 a cat 0")
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-model"] == "fake/model"
    assert server.status(answer.headers["x-request-id"]) == "completed"
    assert set(json.loads(answer.headers["x-stage-durations"])) == {"encode", "denoise", "decode", "save"}
    failed = server.http.post("/v1/videos/sync", json={"prompt": "fail_in=save with=oom"})
    _refused(failed, 422, "video_failed", "out of memory")


def test_a_client_that_leaves_sync_cancels(server: LocalServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"prompt": "wait", "num_inference_steps": 100})
    connection.request("POST", "/v1/videos/sync", body, {"Content-Type": "application/json"})
    wait_for(lambda: server.http.get("/v1/videos").json()["data"])
    connection.close()
    wait_for(lambda: server.http.get("/v1/videos").json()["data"][0]["cancelling"])
    server.steps(1)
    wait_for(lambda: not server.http.get("/v1/videos").json()["data"])


def test_deleting(server: LocalServer) -> None:
    job = server.create(prompt="wait")["id"]
    wait_for(lambda: server.get(job)["phase"] == "denoise")
    assert server.http.delete(f"/v1/videos/{job}").json()["deleted"]
    assert server.get(job)["cancelling"]
    _refused(server.http.delete(f"/v1/videos/{job}"), 409, "cancelling")
    server.steps(1)
    wait_for(lambda: server.http.get(f"/v1/videos/{job}").status_code == 404)
    _refused(server.http.delete(f"/v1/videos/{job}"), 404, "not_found")


def test_content_before_the_end_and_of_a_failure(server: LocalServer) -> None:
    job = server.create(prompt="wait")["id"]
    _refused(server.http.get(f"/v1/videos/{job}/content"), 404, "not_ready")
    _refused(server.http.get(f"/v1/videos/{UNKNOWN}/content"), 404, "not_found")
    server.steps(3)
    server.ended(job)
    _refused(server.http.get(f"/v1/videos/{job}/content?variant=thumbnail"), 400, "invalid_value")
    head = server.http.head(f"/v1/videos/{job}/content")
    assert (head.status_code, head.headers["accept-ranges"], head.content) == (200, "bytes", b"")
    assert server.http.get(f"/v1/videos/{job}/content", headers={"Range": "bytes=999-"}).status_code == 416
    failed = server.create(prompt="fail_in=encode")["id"]
    server.ended(failed)
    _refused(server.http.get(f"/v1/videos/{failed}/content"), 422, "video_failed")


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("oom", "out_of_memory", "smaller or shorter"),
        ("value", "invalid_request", "takes no such video; use another"),
        ("bug", "internal_error", "its log tells why"),
    ],
)
def test_a_failing_job_fails_alone(server: LocalServer, kind: str, code: str, text: str) -> None:
    for place in ("encode", "denoise", "save"):
        job = server.ended(server.create(prompt=f"fail_in={place} with={kind}")["id"])
        assert job["status"] == "failed"
        assert job["error"]["code"] == code
        assert text in job["error"]["message"]
        assert "/root" not in json.dumps(job["error"])
    assert server.completed()["status"] == "completed"
    assert server.backend.recovered == 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 4097}, "4097 characters; use 4096 at most"),
        ({"negative_prompt": "x" * 5000}, "negative_prompt has 5000"),
        ({"prompt": "refuse"}, "this prompt is refused"),
        ({"size": "64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "64x64", "width": 64}, "both given"),
        ({"width": 72}, "multiples of 16; use 64 or 80"),
        ({"width": 20000, "height": 20000}, "above this server's limit"),
        ({"num_frames": 6}, "use 5"),
        ({"num_frames": 5, "seconds": "4"}, "both given"),
        ({"num_frames": 165}, "num_frames 165 is above"),
        ({"num_inference_steps": 101}, "above this server's limit of 100"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"size": "1280x720", "num_frames": 161, "num_inference_steps": 100}, "fewer pixels, frames or steps"),
        ({"seed": 2**53}, "seed"),
        ({"guidance_scale": 101}, "guidance_scale"),
        ({"guidance_scale_2": False}, "true and false are no values"),
        ({"seconds": True}, "true and false are no values"),
        ({"seed": False}, "true and false are no values"),
        ({"model": "sora-2"}, "this server has 'fake/model'"),
        ({"sparse_attn_backend": "none", "sparse_attn_topk": 0.5}, "leave topk and schedule out"),
        ({"sparse_attn_topk": 1.5}, "sparse_attn_topk"),
        ({"nonsense": 1}, "nonsense"),
        ({"input_reference": {"image_url": "/etc/passwd"}}, "this server fetches nothing"),
        ({"input_reference": {"image_url": "file:///etc/passwd"}}, "this server fetches nothing"),
        ({"input_reference": {"image_url": "http://127.0.0.1/x.png"}}, "this server fetches nothing"),
        ({"input_reference": {"image_url": "data:image/png;base64,!!!"}}, "no base64"),
        ({"input_reference": {"image_url": "data:image/png;base64,aGFsbG8="}}, "broken"),
        ({"input_reference": {"file_id": "x"}}, "image_url"),
    ],
)
def test_refused_fields(server: LocalServer, fields: dict[str, Any], text: str) -> None:
    answer = server.http.post("/v1/videos", json={"prompt": "a cat", **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    assert text in answer.json()["error"]["message"]
    assert server.store.counts()["queued"] == 0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server: LocalServer, number: str) -> None:
    body = f'{{"prompt": "a cat", "guidance_scale": {number}}}'
    answer = server.http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"", 400),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"prompt": "\\ud800"}', 400),
        ("application/json", b'{"prompt": "\xff"}', 400),
        ("application/json", b"[" * 100_000, 400),
        ("text/plain", b"a cat", 415),
        ("application/x-www-form-urlencoded", b"prompt=a", 415),
        ("multipart/form-data", b"prompt=a", 400),
        ("multipart/form-data; boundary=x", b"--y\r\n", 400),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', 400),
    ],
)
def test_malformed_bodies(server: LocalServer, kind: str, body: bytes, status: int) -> None:
    for path in ("/v1/videos", "/v1/videos/sync"):
        answer = server.http.post(path, content=body, headers={"Content-Type": kind})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert not any(server.store.counts().values())


def test_forms(server: LocalServer) -> None:
    fields = {"prompt": "a cat", "seed": "9", "size": "32x32", "seconds": "1", "guidance_scale": "2.5"}
    answer = server.http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["seed"], job["size"], job["num_frames"], job["guidance_scale"]) == (9, "32x32", 9, 2.5)
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    _refused(server.http.post("/v1/videos", files=twice), 400, "invalid_value", "given twice")
    as_file = {"prompt": ("x.txt", b"a")}
    _refused(server.http.post("/v1/videos", files=as_file), 400, "invalid_value", "no file")
    too_many: Any = {f"field{i}": (None, "x") for i in range(100)}
    assert server.http.post("/v1/videos", files=too_many).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/..%2f..%2fetc%2fpasswd",
        "/v1/videos/..%2f..%2fjobs.sqlite3/content",
        "/v1/videos/%2e%2e/content",
        "/v1/videos/video_" + "0" * 31 + "%00/content",
        f"/v1/videos/{UNKNOWN}%2f..%2f..%2fjobs.sqlite3/content",
        "//etc/passwd",
        "/static/../../jobs.sqlite3",
        "/v1/models/../../../etc/passwd",
        "/v1/videos/" + "a" * 5000,
        "/index.html",
    ],
)
def test_path_tricks(server: LocalServer, path: str) -> None:
    answer = _raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404")
    assert b'"error"' in answer
    assert b"SQLite" not in answer
    assert b"root:" not in answer


def test_file_names_of_clients_are_not_used(server: LocalServer, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    before = {p for p in tmp_path.rglob("*") if "data" not in p.parts}
    files: Any = {
        "prompt": (None, "a cat"),
        "input_reference": ("../../../evil.png", (tmp_path / "x.png").read_bytes()),
    }
    job = server.ended(server.http.post("/v1/videos", files=files).json()["id"])
    assert job["file_name"] == f"{job['id']}.mp4"
    assert {p for p in tmp_path.rglob("*") if "data" not in p.parts} == before


def test_oversize_bodies(tmp_path: Path) -> None:
    with LocalServer(tmp_path, body_bytes=1000) as server:
        told = {"Content-Type": "application/json", "Content-Length": "2000"}
        answer = server.http.post("/v1/videos", content=b"x" * 2000, headers=told)
        _refused(answer, 413, "body_too_large", "1000 bytes")

        def pieces() -> Iterator[bytes]:
            yield from [b"x" * 300] * 10

        chunked = server.http.post("/v1/videos", content=pieces(), headers={"Content-Type": "application/json"})
        _refused(chunked, 413, "body_too_large")
        form = server.http.post("/v1/videos", files={"prompt": (None, "x" * 5000)})
        _refused(form, 413, "body_too_large")
        assert server.completed()["status"] == "completed"


def test_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("1", (3000, 3000)).save(out, "PNG")  # small as a file
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    with LocalServer(tmp_path, image_pixels=1_000_000) as server:
        body = {"prompt": "a cat", "input_reference": {"image_url": url}}
        _refused(server.http.post("/v1/videos", json=body), 413, "image_too_large", "3000x3000")


def test_a_full_queue(tmp_path: Path) -> None:
    with LocalServer(tmp_path, queue=2) as server:
        running = server.create(prompt="wait")["id"]
        wait_for(lambda: server.status(running) == "in_progress")
        waiting = [server.create(seed=seed)["id"] for seed in range(2)]
        answer = server.http.post("/v1/videos", json={"prompt": "a cat"})
        _refused(answer, 429, "queue_full", "2 jobs wait")
        assert int(answer.headers["Retry-After"]) >= 1
        server.steps(3)
        assert all(server.ended(job)["status"] == "completed" for job in waiting)
        assert server.completed()["status"] == "completed"


def test_api_key(tmp_path: Path) -> None:
    with LocalServer(tmp_path, api_key="secret") as server:
        assert server.completed()["status"] == "completed"
        for header in ({}, {"Authorization": "Bearer secreT"}, {"Authorization": "Basic secret"}):
            with httpx.Client(base_url=server.url, headers=header, trust_env=False) as other:
                for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", f"/v1/videos/{UNKNOWN}")):
                    _refused(other.request(method, path), 401, "invalid_api_key")
                assert other.get("/health").status_code == 200
                assert other.get("/").status_code == 200
        # With a key, the server may go by any name.
        assert server.http.get("/v1/videos", headers={"Host": "video.example.org"}).status_code == 200


def test_names_and_pages_of_others(server: LocalServer) -> None:
    for host in ("evil.example.org", f"evil.example.org:{server.port}", "localhost.evil.example.org", ""):
        _refused(server.http.get("/v1/videos", headers={"Host": host}), 403, "unknown_host")
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "192.168.1.2:80", "[::1]:80"):
        assert server.http.get("/v1/videos", headers={"Host": host}).status_code == 200
    for origin in ("http://evil.example.org", "null", f"http://127.0.0.1:{server.port + 1}"):
        answer = server.http.post("/v1/videos", json={"prompt": "a"}, headers={"Origin": origin})
        _refused(answer, 403, "foreign_origin")
    assert server.http.get("/v1/videos", headers={"Origin": server.url}).status_code == 200


@pytest.mark.parametrize("key", [None, "secret"])
def test_hosts_and_origins_that_are_none(tmp_path: Path, key: str | None) -> None:
    with LocalServer(tmp_path, api_key=key) as server:
        for host in (
            "[",
            "[::1",
            "a]b",
            "localhost:port",
            "127.0.0.1:99999",
            "[v1.x",
            "\u2100".encode().decode("latin-1"),
        ):
            answer = server.http.get("/v1/videos", headers={b"Host": host.encode("latin-1")})
            assert answer.status_code in (400, 403) or key, host
            assert answer.status_code < 500
            if "[" in host or ":" in host:
                _refused(answer, 400, "invalid_host")
        for origin in ("http://[", "http://[::1", "//]", "[", "http://a]b/"):
            _refused(server.http.get("/v1/videos", headers={"Origin": origin}), 403, "foreign_origin")
        for url in ("http://[", "http://[::1", "http://a:b/", "https://\u2100/", "http://" + "a" * 300, "http://%00/"):
            body = {"prompt": "a cat", "input_reference": {"image_url": url}}
            assert server.http.post("/v1/videos", json=body).status_code == 400


def test_bodies_at_once(tmp_path: Path) -> None:
    """What is announced counts, and what comes without being announced; what has gone counts no more."""
    with LocalServer(tmp_path, body_bytes=1000, bodies_bytes=1500) as server:
        start = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        held: list[socket.socket] = []

        def refused() -> httpx.Response | None:
            # One more each time, for one that comes while another request is being read may itself be refused.
            held.append(socket.create_connection(("127.0.0.1", server.port)))
            held[-1].sendall(start + b"Content-Length: 900\r\n\r\n{")
            answer = server.http.post("/v1/videos", json={"prompt": "x" * 700})
            return answer if answer.status_code == 429 else None

        answer = wait_for(refused)
        _refused(answer, 429, "too_many_bytes", "1500 at most")
        assert answer.headers["Retry-After"] == "1"

        def pieces() -> Iterator[bytes]:
            yield from [b"x" * 100] * 8

        kind = {"Content-Type": "application/json"}
        _refused(server.http.post("/v1/videos", content=pieces(), headers=kind), 429, "too_many_bytes")
        assert server.completed()["status"] == "completed"  # a small one has room
        for connection in held:
            connection.close()
        wait_for(lambda: server.http.post("/v1/videos", json={"prompt": "x" * 700}).status_code == 200)


def test_a_body_counts_while_it_is_read_and_not_while_its_video_is_made(tmp_path: Path) -> None:
    body = {"prompt": "wait", "negative_prompt": "x" * 900, "num_inference_steps": 100}
    with LocalServer(tmp_path, body_bytes=1100, bodies_bytes=1100) as server:
        waiting = threading.Thread(
            target=server.http.post, args=("/v1/videos/sync",), kwargs={"json": body}, daemon=True
        )
        waiting.start()
        wait_for(lambda: server.http.get("/v1/videos").json()["data"])
        wait_for(lambda: server.http.post("/v1/videos", json={**body, "prompt": "a cat"}).status_code == 200)
        server.steps(100)
        waiting.join(60)


def test_fetched_pictures_count_as_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, go_on = threading.Event(), threading.Event()

    async def slow(*_: Any) -> bytes:
        fetching.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return b""

    monkeypatch.setattr("sp_sparse.serve.images.fetch", slow)
    body = {"prompt": "a cat", "input_reference": {"image_url": "http://example.org/x.png"}}
    with LocalServer(tmp_path, body_bytes=1000, bodies_bytes=1500, image_urls=True) as server:
        first = threading.Thread(target=server.http.post, args=("/v1/videos",), kwargs={"json": body}, daemon=True)
        first.start()
        assert fetching.wait(60)
        _refused(server.http.post("/v1/videos", json=body), 429, "too_many_bytes")
        go_on.set()
        first.join(60)


def _noise(side: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(out, "JPEG", quality=30)
    return out.getvalue()


def test_pictures_that_are_decoded_hold_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More uploads than there are threads for requests, none of which gets done."""
    from PIL import Image

    go_on, real = threading.Event(), Image.open

    def slow(*arguments: Any, **options: Any) -> Any:
        go_on.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", slow)
    data = _noise(100)
    with LocalServer(tmp_path) as server:
        files: Any = {"prompt": (None, "a cat"), "input_reference": ("x.jpg", data)}
        statuses: list[int] = []

        def post() -> None:
            statuses.append(httpx.post(f"{server.url}/v1/videos", files=files, trust_env=False, timeout=90).status_code)

        posts = [threading.Thread(target=post, daemon=True) for _ in range(50)]
        try:
            for one in posts:
                one.start()
            wait_for(lambda: len(server.connections) >= 50)
            assert httpx.get(f"{server.url}/v1/videos", trust_env=False, timeout=20).status_code == 200
        finally:
            go_on.set()
        for one in posts:
            one.join(60)
        assert statuses == [200] * 50


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_room_that_pictures_take(tmp_path: Path) -> None:
    """As many pixels as their videos need while jobs wait, and nothing when they have ended."""
    with LocalServer(tmp_path) as server:
        blocking = server.create(prompt="wait")["id"]
        empty = _size(tmp_path)
        files: Any = {"prompt": (None, "wait"), "input_reference": ("x.jpg", _noise(1500))}
        jobs = [server.http.post("/v1/videos", files=files).json()["id"] for _ in range(5)]
        assert _size(tmp_path) - empty < 5 * (64 * 64 * 4 + 50_000)  # SQLite's own pages included
        large: Any = {**files, "size": (None, "720x720")}
        jobs += [server.http.post("/v1/videos", files=large).json()["id"] for _ in range(3)]
        assert _size(tmp_path) - empty > 3 * 100_000
        server.steps(1000)
        for job in (blocking, *jobs):
            assert server.ended(job)["status"] == "completed"
        wait_for(lambda: _size(tmp_path) - empty < 100_000)


def test_health_models_metrics_and_documents(server: LocalServer) -> None:
    server.completed()
    server.ended(server.create(prompt="fail_in=denoise with=oom")["id"])
    assert server.http.get("/health").json() == {"live": True, "ready": True, "state": "ready"}
    model = server.http.get("/v1/models").json()["data"][0]
    assert (model["defaults"]["sparse_topk"], model["limits"]["queue"]) == (0.3, 64)
    assert model["defaults"]["prompt"] == "a fox"
    _refused(server.http.get("/v1/models/other"), 404, "model_not_found")
    text = server.http.get("/metrics").text
    for line in (
        "sp_sparse_ready 1.0",
        "sp_sparse_queued_jobs 0.0",
        "sp_sparse_running_jobs 0.0",
        "sp_sparse_density",
        "sp_sparse_peak_memory_bytes",
    ):
        assert f"\n{line}" in text
    assert 'route="/v1/videos/{video_id}",status="200"' in text
    assert "UNKNOWN" not in text
    document = server.http.get("/openapi.json").json()
    assert set(document["paths"]["/v1/videos"]) == {"get", "post"}
    assert set(document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    assert server.http.get("/docs").status_code == 200
    assert server.http.put("/v1/videos").status_code == 405


def test_draining_takes_nothing_new(tmp_path: Path) -> None:
    with LocalServer(tmp_path) as server:
        running = server.create(prompt="wait")["id"]
        wait_for(lambda: server.get(running)["phase"] == "denoise")
        server.engine.drain(60)
        answer = server.http.post("/v1/videos", json={"prompt": "a cat"})
        _refused(answer, 503, "draining")
        assert answer.headers["Retry-After"]
        assert server.http.get("/health/ready").status_code == 503
        assert server.http.get("/health").json()["state"] == "draining"
        server.steps(3)
        assert server.ended(running)["status"] == "completed"


def test_a_slow_client_is_cut_off(tmp_path: Path) -> None:
    with LocalServer(tmp_path, body_s=1.0) as server:
        start = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert _raw(server, b"POST /v1/vid") == b""  # headers never end
        assert _raw(server, b"") == b""
        answer = _raw(server, start + b"Content-Length: 100\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408")
        # A second request on a kept connection, too.
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert _raw(server, ask + b"GET /heal").count(b"HTTP/1.1 200") == 1
        assert server.completed()["status"] == "completed"


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    with LocalServer(tmp_path, body_s=1.0) as server:
        job = server.completed()
        server.store.video_path(job["id"]).write_bytes(b"x" * (64 << 20))
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(f"GET /v1/videos/{job['id']}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            route = 'route="/v1/videos/{video_id}/content",status="408"'
            wait_for(lambda: route in server.http.get("/metrics").text)
            # The server lets go of the connection: only this test's other one is left.
            wait_for(lambda: len(server.connections) == 1)
        assert server.completed()["status"] == "completed"


def test_too_many_requests_at_once(tmp_path: Path) -> None:
    with LocalServer(tmp_path, requests=3) as server:
        held: list[socket.socket] = []

        def refused() -> bool:
            # One more each time, for one that comes while another request is being answered may itself be refused.
            held.append(socket.create_connection(("127.0.0.1", server.port)))
            held[-1].sendall(
                b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 20\r\n\r\n{"
            )
            return server.http.get("/v1/videos").status_code == 429

        try:
            wait_for(refused)
            answer = server.http.get("/v1/videos")
            _refused(answer, 429, "too_many_requests")
            assert answer.headers["Retry-After"] == "1"
            assert server.http.get("/health").status_code == 200
        finally:
            for connection in held:
                connection.close()
        wait_for(lambda: server.http.get("/v1/videos").status_code == 200)
        assert 'status="499"' in server.http.get("/metrics").text  # clients that left, without a trace in the log


def test_work_does_not_hold_up_health(server: LocalServer) -> None:
    """Every thread that handlers may use is taken by requests that wait for the store."""
    with server.store._database.lock:
        waiting = [threading.Thread(target=server.http.get, args=("/v1/videos",), daemon=True) for _ in range(50)]
        for thread in waiting:
            thread.start()
        assert httpx.get(f"{server.url}/health", trust_env=False, timeout=30).status_code == 200
    for thread in waiting:
        thread.join(60)
