"""Jobs in SQLite, videos in files: what was accepted is never lost, and what is listed is there."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sp_sparse.serve.backend import JobParameters
from sp_sparse.serve.jobs import COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, JobError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    cancelling INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    parameters TEXT NOT NULL,
    image BLOB,
    error_code TEXT,
    error_message TEXT,
    result TEXT NOT NULL DEFAULT '{}',
    bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
"""
_VERSION = 1

# In the header of the database: who made it.
_APPLICATION = int.from_bytes(b"spSV", "big")

_DATABASE = "jobs.sqlite3"

# What this server calls its videos, and those that it has not finished writing.
_OWN_NAME = re.compile(r"\.?(video|warm-up)_[0-9a-f]{32}(\.[0-9]+)?\.mp4")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# A disk with less is full: SQLite tells some of its failed writes without saying why.
_ROOM_BYTES = 1 << 16

_COLUMNS = (
    "number, id, status, cancelling, tries, created_at, started_at, completed_at, parameters, error_code, error_message, "
    "result, image IS NOT NULL"
)


log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """No further job is taken now."""


class StoreError(RuntimeError):
    """The database cannot be read or written now; nothing has changed."""


class NoRoomError(StoreError):
    """The disk is full; nothing has changed."""


def is_no_room(error: BaseException) -> bool:
    """Whether the disk, or a share of it, is full."""
    return isinstance(error, NoRoomError) or (isinstance(error, OSError) and error.errno in _NO_ROOM)


_OWN_COLUMNS = {
    *("number", "id", "status", "cancelling", "tries", "created_at", "started_at", "completed_at", "parameters"),
    *("image", "error_code", "error_message", "result", "bytes"),
}


class JobStore:
    """All jobs of a folder. Every method is atomic and may be called from any thread.

    A job is stored before it is acknowledged, and a video is on the disk before its job is `completed`.
    """

    def __init__(self, folder: Path, max_tries: int = 3) -> None:
        """Open or make the store.

        Raises:
            OSError: the folder cannot be written, or another server uses it.
            ValueError: the folder holds what is not this server's, its database is broken, or a newer version wrote it.
            StoreError: the database cannot be opened, for one because the disk is full.
        """
        self.folder, self._videos, self._max_tries = folder, folder / "videos", max_tries
        self._lock = threading.RLock()
        self._unneeded: list[Path] = []
        database, lock = folder / _DATABASE, folder / "lock"
        try:
            _check_own(folder)
            made = not lock.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock.open("a")  # what is in it is kept
        except OSError as error:
            raise OSError(f"{folder} cannot be used ({error.strerror}); give another --data-dir") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise OSError(f"{folder} is used by another server; stop it, or give another --data-dir") from error
        try:
            with self._told():
                self._db = sqlite3.connect(database, check_same_thread=False, isolation_level=None)
                self._open(database)
            self._videos.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise OSError(f"{folder} cannot be used ({error.strerror}); give another --data-dir") from error
        except BaseException as error:
            if made and isinstance(error, ValueError):
                lock.unlink()
            self.close()
            raise

    def _open(self, database: Path) -> None:
        """Look whose the database is before anything is written."""
        folder = self.folder
        # The folder is locked: without shared memory, which is a file, there is a start on a full disk.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            names = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master").fetchall()}
            columns = {row[1] for row in self._db.execute("PRAGMA table_info(jobs)").fetchall()}
            application, version = (
                self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            broken = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            broken, names, columns, application, version = str(error), set(), set(), 0, 0
        if broken != "ok":
            raise ValueError(
                f"{database} is no database, or broken ({' '.join(broken.split())}); move it and {self._videos} away (the "
                "videos there remain whole), or give another --data-dir"
            )
        if names and application != _APPLICATION and (application != 0 or not columns >= _OWN_COLUMNS):
            raise ValueError(
                f"{database} is not this server's: it was made by another program; move it away, or give another --data-dir"
            )
        if version > _VERSION:
            raise ValueError(f"{folder} has format {version}, but this server reads up to {_VERSION}; update sp_sparse")
        is_new = (application, version) != (_APPLICATION, _VERSION)
        if is_new:
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if is_new:  # else nothing is written, for which a full disk has no room
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Let another server use the folder."""
        if hasattr(self, "_db"):
            self._db.close()
        self._lock_file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says, as an error of the store that tells whether the disk is full."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                if "full" in str(error) or self._is_full():
                    text = f"the disk of {self.folder} is full ({error}); make room there"
                    raise NoRoomError(text) from error
                text = f"{self.folder / _DATABASE} cannot be used now ({error}); see whether its disk is well"
                raise StoreError(text) from error

    def _is_full(self) -> bool:
        try:
            return shutil.disk_usage(self.folder).free < _ROOM_BYTES
        except OSError:
            return False

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._unneeded.clear()
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise
            # Files last: one without a row is swept at the next start, a row without its file would be a lie.
            while self._unneeded:
                path = self._unneeded.pop()
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s cannot be removed (%s); the next start tries again", path, error.strerror)

    def _shrink(self) -> None:
        """Give back the room of pictures that are not needed any more; nothing depends on it."""
        with self._lock, suppress(sqlite3.Error):
            self._db.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def video_path(self, job_id: str) -> Path:
        """Where the video of a stored job is, or will be."""
        return self._videos / f"{job_id}.mp4"

    def add(self, job: JobParameters, max_queue: int) -> Job:
        """Queue a job.

        Raises:
            QueueFullError: `max_queue` jobs wait.
        """
        parameters = asdict(job)
        image = parameters.pop("image")
        job_id = f"video_{uuid.uuid4().hex}"
        with self._transaction() as db:
            if self._count(QUEUED) >= max_queue:
                raise QueueFullError
            db.execute(
                "INSERT INTO jobs (id, status, created_at, parameters, image) VALUES (?, ?, ?, ?, ?)",
                (job_id, QUEUED, time.time(), json.dumps(parameters), image),
            )
            return self._required(job_id)

    def get(self, job_id: str) -> Job | None:
        with self._told():
            return self._one("WHERE id = ?", job_id)

    def list(self, after: str | None, limit: int, ascending: bool) -> tuple[list[Job], bool]:
        """A page of jobs after a job, newest first or oldest first, and whether there are more.

        Raises:
            KeyError: there is no job `after`.
        """
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        with self._told():
            where, values = "", []
            if after is not None:
                where, values = f"WHERE number {sign} ?", [self._required(after).number]
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM jobs {where} ORDER BY number {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def counts(self) -> dict[str, int]:
        """Jobs in each state."""
        with self._told():
            found = dict(self._db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in (QUEUED, IN_PROGRESS, COMPLETED, FAILED)}

    def ahead_of(self, job: Job) -> int:
        """How many jobs run or wait before a queued one."""
        with self._told():
            row = self._db.execute(
                "SELECT COUNT(*) FROM jobs WHERE number < ? AND status IN (?, ?)", (job.number, QUEUED, IN_PROGRESS)
            )
            return int(row.fetchone()[0])

    def start_next(self) -> tuple[Job, JobParameters] | None:
        """Take the oldest queued job; None if there is none."""
        with self._transaction() as db:
            job = self._one("WHERE status = ? ORDER BY number LIMIT 1", QUEUED)
            if job is None:
                return None
            db.execute(
                "UPDATE jobs SET status = ?, tries = tries + 1, started_at = ? WHERE id = ?",
                (IN_PROGRESS, time.time(), job.id),
            )
            image = db.execute("SELECT image FROM jobs WHERE id = ?", (job.id,)).fetchone()[0]
            return self._required(job.id), JobParameters(**job.parameters, image=image)

    def complete(self, job_id: str, result: dict[str, Any]) -> None:
        """The video lies at `video_path`; a job that was deleted meanwhile goes with it.

        Raises:
            OSError: the video is not on the disk.
        """
        path = self.video_path(job_id)
        _flush(path)
        with self._transaction() as db:
            if self._required(job_id).cancelling:
                self._remove(job_id)
            else:
                self._complete(db, job_id, result)
        self._shrink()

    def fail(self, job_id: str, error: JobError) -> None:
        """A job that was deleted meanwhile goes instead."""
        with self._transaction() as db:
            if self._required(job_id).cancelling:
                self._remove(job_id)
            else:
                self._fail(db, job_id, error)
                self._unneeded.append(self.video_path(job_id))
        self._shrink()

    def requeue(self, job_id: str) -> None:
        """Give back a job that was started and then interrupted by a shutdown; this was no try."""
        with self._transaction() as db:
            if self._required(job_id).cancelling:
                self._remove(job_id)
                return
            db.execute(
                "UPDATE jobs SET status = ?, tries = tries - 1, started_at = NULL WHERE id = ?", (QUEUED, job_id)
            )

    def delete(self, job_id: str) -> str:
        """`deleted`; or `cancelling` for one that runs and has yet to stop.

        Raises:
            KeyError: there is no such job.
            ValueError: it is being cancelled already.
        """
        with self._transaction() as db:
            job = self._required(job_id)
            if job.status != IN_PROGRESS:
                self._remove(job_id)
                return "deleted"
            if job.cancelling:
                raise ValueError(f"{job_id} is being cancelled already; it goes when its step has ended")
            db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ?", (job_id,))
            return "cancelling"

    def remove(self, job_id: str) -> None:
        """A job that was cancelled has stopped."""
        with self._transaction():
            self._remove(job_id)
        self._shrink()

    def recover(self) -> dict[str, int]:
        """After a start: sort out what the last server left. How many jobs were requeued, failed, removed and found done."""
        done = {"requeued": 0, "failed": 0, "removed": 0, "found completed": 0}
        with self._transaction() as db:
            for row in db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE status = ?", (IN_PROGRESS,)).fetchall():
                job = _job(row)
                if job.cancelling:
                    self._remove(job.id)
                    done["removed"] += 1
                elif _is_there(self.video_path(job.id)):  # saved whole, though the server did not come to write it down
                    self._complete(db, job.id, {})
                    done["found completed"] += 1
                elif job.tries >= self._max_tries:
                    text = f"the server stopped {job.tries} times while it made this video; see its log"
                    self._fail(db, job.id, JobError("interrupted", text))
                    done["failed"] += 1
                else:
                    db.execute("UPDATE jobs SET status = ?, started_at = NULL WHERE id = ?", (QUEUED, job.id))
                    done["requeued"] += 1
            known = set()
            for (job_id,) in db.execute("SELECT id FROM jobs WHERE status = ?", (COMPLETED,)).fetchall():
                if self.video_path(job_id).is_file():
                    known.add(self.video_path(job_id).name)
                else:
                    self._fail(db, job_id, JobError("internal_error", "the file of this video is gone"))
                    done["failed"] += 1
        for path in self._videos.iterdir():
            # Half-written, or of a job that was stopped; what others put here is theirs.
            if _OWN_NAME.fullmatch(path.name) and path.name not in known and not path.is_dir():
                path.unlink()
        return done

    def expire(self, keep_s: float, keep_bytes: int) -> int:
        """Remove finished jobs that ended more than `keep_s` ago, then the oldest until videos take `keep_bytes` at most."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT id, completed_at, bytes FROM jobs WHERE status IN (?, ?) ORDER BY completed_at DESC",
                (COMPLETED, FAILED),
            ).fetchall()
            oldest, total, removed = time.time() - keep_s, 0, 0
            for job_id, completed_at, size in rows:
                total += size
                if completed_at < oldest or total > keep_bytes:
                    self._remove(job_id)
                    removed += 1
            return removed

    def _count(self, status: str) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM jobs WHERE status = ?", (status,)).fetchone()[0])

    def _complete(self, db: sqlite3.Connection, job_id: str, result: dict[str, Any]) -> None:
        db.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, result = ?, bytes = ?, image = NULL WHERE id = ?",
            (COMPLETED, time.time(), json.dumps(result), self.video_path(job_id).stat().st_size, job_id),
        )

    def _fail(self, db: sqlite3.Connection, job_id: str, error: JobError) -> None:
        db.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, error_code = ?, error_message = ?, image = NULL, bytes = 0 "
            "WHERE id = ?",
            (FAILED, time.time(), error.code, error.message, job_id),
        )

    def _remove(self, job_id: str) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self._unneeded.append(self.video_path(job_id))

    def _one(self, where: str, *values: Any) -> Job | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchone()
        return None if row is None else _job(row)

    def _required(self, job_id: str) -> Job:
        job = self._one("WHERE id = ?", job_id)
        if job is None:
            raise KeyError(job_id)
        return job


def _job(row: tuple[Any, ...]) -> Job:
    number, job_id, status, cancelling, tries, created, started, completed, parameters, code, message, result, image = (
        row
    )
    return Job(
        number=number,
        id=job_id,
        status=status,
        cancelling=bool(cancelling),
        tries=tries,
        created_at=created,
        started_at=started,
        completed_at=completed,
        parameters=json.loads(parameters),
        error=None if code is None else JobError(code, message),
        result=json.loads(result),
        has_image=bool(image),
    )


def _check_own(folder: Path) -> None:
    """Refuse a folder without our database that holds anything: it is somebody else's.

    Raises:
        ValueError: with what it holds.
    """
    if not folder.is_dir() or (folder / _DATABASE).exists():
        return
    found = sorted(path.name for path in folder.iterdir() if not _is_empty(path))
    if found:
        text = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(
            f"{folder} was not made by this server: it has no {_DATABASE}, but {text}; give another --data-dir, or move "
            "these away"
        )


def _is_empty(path: Path) -> bool:
    """Whether this is a `lock` or `videos` as a server leaves them that was stopped at its first start."""
    if path.name == "lock":
        return path.is_file() and path.stat().st_size == 0
    return path.name == "videos" and path.is_dir() and not any(path.iterdir())


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _flush(path: Path) -> None:
    """Have a file and its name on the disk."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
