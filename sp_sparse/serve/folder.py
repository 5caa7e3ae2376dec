"""The data folder: of one server at a time, and what is not this server's in it stays as it is.

lock             held while a server runs
jobs.sqlite3     see `serve/database.py`
videos/          finished videos, and beside them those that are being written
"""

from __future__ import annotations

import fcntl
import logging
import re
from pathlib import Path

_DATABASE, _LOCK, _VIDEOS = "jobs.sqlite3", "lock", "videos"

# What this server calls its videos, and those that it has not finished writing.
_OWN_NAME = re.compile(r"\.?(video|warm-up)_[0-9a-f]{32}(\.[0-9]+)?\.mp4")

log = logging.getLogger(__name__)


class DataFolder:
    """A folder that no other server uses until `release`.

    Attributes:
        path: the folder.
        database: where the database is, or will be.
        videos: where the videos are, once `make_videos` was called.
    """

    def __init__(self, path: Path) -> None:
        """Lock the folder; make it where there is none.

        Raises:
            OSError: it cannot be written, or another server uses it.
            ValueError: it has no database and holds what is not this server's.
        """
        self.path, self.database, self.videos = path, path / _DATABASE, path / _VIDEOS
        lock = path / _LOCK
        try:
            self._check_own()
            self._made_lock = not lock.exists()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.open("a")  # what is in it is kept
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OSError(f"{path} is used by another server; stop it, or give another --data-dir") from error

    def make_videos(self) -> None:
        """Make the folder of the videos.

        Raises:
            OSError: it cannot be made.
        """
        try:
            self.videos.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def release(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    def leave(self) -> None:
        """The folder is somebody else's: leave it as it was found."""
        if self._made_lock:
            (self.path / _LOCK).unlink()
        self.release()

    def video(self, job_id: str) -> Path:
        """Where the video of a job is, or will be."""
        return self.videos / f"{job_id}.mp4"

    def remove_video(self, job_id: str) -> None:
        """Remove the video of a job, if it has one; one that cannot be removed is swept later."""
        path = self.video(job_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed (%s); the next start tries again", path, error.strerror)

    def sweep(self, job_ids: set[str]) -> None:
        """Remove videos that are half-written, or not of these jobs; what others put here is theirs.

        Raises:
            OSError: one cannot be removed.
        """
        known = {self.video(job_id).name for job_id in job_ids}
        for path in self.videos.iterdir():
            if _OWN_NAME.fullmatch(path.name) and path.name not in known and not path.is_dir():
                path.unlink()

    def _check_own(self) -> None:
        """Refuse a folder without our database that holds anything: it is somebody else's.

        Raises:
            ValueError: with what it holds.
        """
        if not self.path.is_dir() or self.database.exists():
            return
        found = sorted(path.name for path in self.path.iterdir() if not _is_unused(path))
        if found:
            text = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            raise ValueError(
                f"{self.path} was not made by this server: it has no {_DATABASE}, but {text}; give another --data-dir, or "
                "move these away"
            )

    def _unusable(self, error: OSError) -> OSError:
        return OSError(f"{self.path} cannot be used ({error.strerror}); give another --data-dir")


def _is_unused(path: Path) -> bool:
    """Whether this is a `lock` or `videos` as a server leaves them that was stopped at its first start."""
    if path.name == _LOCK:
        return path.is_file() and path.stat().st_size == 0
    return path.name == _VIDEOS and path.is_dir() and not any(path.iterdir())
