"""A disk that is full and a database that fails: jobs fail or wait, the server goes on, nothing is lost or made twice."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from sp_sparse.generate.files import decoded_pixels, save_tensor, save_video
from sp_sparse.serve.disk import NoRoomError, StoreError, is_no_room
from sp_sparse.serve.store import JobStore
from tests.processes import wait_for
from tests.serving.fake import LocalServer


class Disk:
    """A small file system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filling = folder, folder / "filling"

    def fill(self) -> None:
        """Leave no byte."""
        with suppress(OSError), self._filling.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._filling.unlink()


def _mount(folder: Path, size: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    _mount(folder, "2m")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["Retry-After"]) > 0


def test_a_video_that_has_no_room_fails_and_the_next_is_made(disk: Disk) -> None:
    with LocalServer(disk.folder / "data") as server:
        done = server.completed(seed=5)["id"]
        failing, waiting = server.create(prompt="wait")["id"], server.create(seed=6)["id"]
        wait_for(lambda: server.get(failing)["phase"] == "denoise")
        disk.fill()
        server.steps(3)
        _refused(server.http.post("/v1/videos", json={"prompt": "a cat"}), 507, "no_room")
        assert server.status(failing) == "in_progress"  # its end has no room either
        assert server.content(done) == b"video 5 a cat 0"
        assert server.is_ready()
        disk.free()
        assert server.ended(failing)["error"]["code"] == "no_room"
        assert server.ended(waiting)["tries"] == 1
        assert server.content(waiting) == b"video 6 a cat 0"
        assert server.content(server.completed(seed=7)["id"]) == b"video 7 a cat 0"
        assert [path.name for path in (disk.folder / "data" / "videos").iterdir() if failing in path.name] == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_finished_video_that_cannot_be_written_down_is_kept(disk: Disk, restarted: bool) -> None:
    with LocalServer(disk.folder / "data") as server:
        server.backend.after_save = disk.fill
        job = server.create(seed=5)["id"]
        video = server.store.video_path(job)
        wait_for(video.exists)
        wait_for(lambda: server.http.post("/v1/videos", json={"prompt": "a cat"}).status_code == 507)
        assert server.status(job) == "in_progress"
        if not restarted:
            server.backend.after_save = lambda: None
            disk.free()
            assert server.ended(job)["tries"] == 1
            assert server.content(job) == b"video 5 a cat 0"
    if restarted:
        disk.free()
        with LocalServer(disk.folder / "data") as server:
            assert (server.status(job), server.get(job)["tries"]) == ("completed", 1)
            assert server.content(job) == b"video 5 a cat 0"
            assert server.completed()["status"] == "completed"


def test_a_full_disk_at_the_start_keeps_what_is_there(disk: Disk) -> None:
    with LocalServer(disk.folder / "data") as server:
        done = server.completed(seed=5)["id"]
    disk.fill()
    with LocalServer(disk.folder / "data") as server:
        assert server.content(done) == b"video 5 a cat 0"
        _refused(server.http.post("/v1/videos", json={"prompt": "a cat"}), 507, "no_room")
        disk.free()
        assert server.completed()["status"] == "completed"


def test_a_first_start_on_a_full_disk_is_refused(disk: Disk) -> None:
    disk.fill()
    with pytest.raises((NoRoomError, OSError), match=r"is full .*make room there|cannot be used"):
        JobStore(disk.folder / "data")


def test_an_upload_that_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of forms wait on the disk of temporary files."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with LocalServer(tmp_path) as server:
        monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
        files: Any = {"prompt": (None, "a cat"), "input_reference": ("x.png", b"x" * 2_000_000)}
        _refused(server.http.post("/v1/videos", files=files), 507, "no_room")
        assert server.completed()["status"] == "completed"


class _FailingDatabase:
    """What SQLite says when its file is broken, or its disk full: whatever begins so fails."""

    def __init__(self, db: Any, error: sqlite3.Error, what: tuple[str, ...]) -> None:
        self._db, self._error, self._what = db, error, what

    def execute(self, query: str, *values: Any) -> Any:
        if query.startswith(self._what):
            raise self._error
        return self._db.execute(query, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


@pytest.mark.parametrize(
    ("free", "kind", "text"),
    [(4096, NoRoomError, "is full .*; make room there"), (1 << 30, StoreError, "disk is well")],
)
def test_a_write_that_fails_without_saying_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: type[Exception], text: str
) -> None:
    """On a full disk SQLite may tell of no more than a failed write."""
    with closing(JobStore(tmp_path)) as store:
        database: Any = store._database
        database._db = _FailingDatabase(database._db, sqlite3.OperationalError("disk I/O error"), ("BEGIN",))
        monkeypatch.setattr("sp_sparse.serve.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        with pytest.raises(StoreError, match=text) as caught:
            store.start_next()
        assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (sqlite3.OperationalError("database or disk is full"), 507, "no_room"),
        (sqlite3.OperationalError("disk I/O error"), 503, "database"),
        (sqlite3.OperationalError("database is locked"), 503, "database"),
        (sqlite3.DatabaseError("database disk image is malformed"), 503, "database"),
    ],
)
@pytest.mark.parametrize("what", [("INSERT", "UPDATE", "DELETE"), ("",)], ids=["writes", "everything"])
def test_a_database_that_fails_for_a_while(
    tmp_path: Path, error: sqlite3.Error, status: int, code: str, what: tuple[str, ...]
) -> None:
    with LocalServer(tmp_path) as server:
        done = server.completed(seed=1)["id"]
        running, waiting = server.create(prompt="wait", seed=2)["id"], server.create(seed=3)["id"]
        wait_for(lambda: server.get(running)["phase"] == "denoise")
        db = server.store._database._db
        server.store._database._db = _FailingDatabase(db, error, what)  # type: ignore[assignment]
        server.steps(3)
        wait_for(server.store.video_path(running).exists)
        _refused(server.http.post("/v1/videos", json={"prompt": "a cat"}), status, code)
        _refused(server.http.delete(f"/v1/videos/{done}"), status, code)
        if what == ("",):
            _refused(server.http.get("/v1/videos"), status, code)
            _refused(server.http.get(f"/v1/videos/{done}"), status, code)
            assert server.http.get("/metrics").status_code == status
        assert server.is_ready()
        server.store._database._db = db
        assert [server.ended(job)["tries"] for job in (running, waiting)] == [1, 1]
        assert [server.content(job)[:7] for job in (done, running, waiting)] == [b"video 1", b"video 2", b"video 3"]


def test_a_video_that_went_before_it_was_written_down_fails(tmp_path: Path) -> None:
    with LocalServer(tmp_path) as server:

        def lose() -> None:
            for path in (tmp_path / "videos").iterdir():
                path.unlink()

        server.backend.after_save = lose
        job = server.ended(server.create()["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "internal_error")
        server.backend.after_save = lambda: None
        assert server.completed()["status"] == "completed"


def test_what_is_no_room() -> None:
    assert is_no_room(OSError(errno.ENOSPC, "x"))
    assert is_no_room(OSError(errno.EDQUOT, "x"))
    assert is_no_room(NoRoomError("x"))
    assert not is_no_room(OSError(errno.EIO, "x"))
    assert not is_no_room(StoreError("x"))


def test_an_mp4_is_whole_or_not_there(tmp_path: Path) -> None:
    """On disks of every size around that of the video; the encoder itself tells only of some."""
    frames = torch.rand(17, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    save_video(frames, tmp_path / "whole.mp4", 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    pages = -(-len(whole) // 4096)
    outcomes = set()
    for size in (pages // 2, pages - 2, pages - 1, pages, pages + 1):
        folder = tmp_path / f"disk_{size}"
        _mount(folder, f"{4 * (size + 1)}k")  # one page is the file system's own
        try:
            outcomes.add(_saved(frames, folder / "video.mp4", whole))
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert outcomes == {"refused", "whole"}


def test_a_tensor_that_has_no_room_says_so(disk: Disk) -> None:
    """torch's own writer tells of positions alone."""
    save_tensor(torch.zeros(1000), disk.folder / "small.pt")
    with pytest.raises(OSError, match=r"large.pt could not be written whole .*; see whether the disk has room"):
        save_tensor(torch.zeros(1_000_000), disk.folder / "large.pt")
    assert [path.name for path in disk.folder.iterdir()] == ["small.pt"]


def _saved(frames: torch.Tensor, path: Path, whole: bytes) -> str:
    error: OSError | None = None
    try:
        save_video(frames, path, 8)
    except OSError as caught:
        error = caught
    if error is not None:
        assert is_no_room(error), error
        assert list(path.parent.iterdir()) == []
        return "refused"
    assert decoded_pixels(path.read_bytes()) == decoded_pixels(whole)
    return "whole"
