"""Jobs in SQLite, videos in files: what was accepted is never lost, and what is listed is there."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sp_sparse.serve import table
from sp_sparse.serve.backend import JobParameters
from sp_sparse.serve.database import Database
from sp_sparse.serve.disk import flush
from sp_sparse.serve.folder import DataFolder
from sp_sparse.serve.jobs import COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, JobError


class QueueFullError(Exception):
    """No further job is taken now."""


class JobStore:
    """All jobs of a folder. Every method is atomic and may be called from any thread.

    A job is stored before it is acknowledged, and a video is on the disk before its job is `completed`. Every method but
    `close` and `video_path` raises `StoreError` while the database cannot be used.
    """

    def __init__(self, folder: Path, max_tries: int = 3) -> None:
        """Open or make the store.

        Raises:
            OSError: the folder cannot be written, or another server uses it.
            ValueError: the folder holds what is not this server's, its database is broken, or a newer version wrote it.
            StoreError: the database cannot be opened, for one because the disk is full.
        """
        self._max_tries = max_tries
        self._unneeded: list[str] = []
        self._folder = DataFolder(folder)
        with ExitStack() as opened:
            opened.callback(self._folder.release)
            try:
                self._database = Database(self._folder)
            except ValueError:
                self._folder.leave()
                raise
            opened.callback(self._database.close)
            self._folder.make_videos()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let another server use the folder."""
        self._opened.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One change of the database, and then of the videos that it makes needless."""
        with self._database.lock:
            self._unneeded.clear()
            with self._database.writing() as db:
                yield db
            # Files last: one without a row is swept at the next start, a row without its file would be a lie.
            for job_id in self._unneeded:
                self._folder.remove_video(job_id)

    def video_path(self, job_id: str) -> Path:
        """Where the video of a stored job is, or will be."""
        return self._folder.video(job_id)

    def add(self, job: JobParameters, max_queue: int) -> Job:
        """Queue a job.

        Raises:
            QueueFullError: `max_queue` jobs wait.
        """
        parameters = asdict(job)
        image = parameters.pop("image")
        job_id = f"video_{uuid.uuid4().hex}"
        with self._transaction() as db:
            if table.counts(db).get(QUEUED, 0) >= max_queue:
                raise QueueFullError
            db.execute(
                "INSERT INTO jobs (id, status, created_at, parameters, image) VALUES (?, ?, ?, ?, ?)",
                (job_id, QUEUED, time.time(), json.dumps(parameters), image),
            )
            return table.required(db, job_id)

    def get(self, job_id: str) -> Job | None:
        """A job; None if there is none of this name."""
        with self._database.reading() as db:
            return table.find(db, job_id)

    def list(self, after: str | None, limit: int, ascending: bool) -> tuple[list[Job], bool]:
        """A page of jobs after a job, newest first or oldest first, and whether there are more.

        Raises:
            KeyError: there is no job `after`.
        """
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        with self._database.reading() as db:
            where, values = "", []
            if after is not None:
                where, values = f"WHERE number {sign} ?", [table.required(db, after).number]
            found = table.jobs(db, f"{where} ORDER BY number {order} LIMIT ?", *values, limit + 1)
        return found[:limit], len(found) > limit

    def counts(self) -> dict[str, int]:
        """Jobs in each state."""
        with self._database.reading() as db:
            found = table.counts(db)
        return {status: found.get(status, 0) for status in (QUEUED, IN_PROGRESS, COMPLETED, FAILED)}

    def ahead_of(self, job: Job) -> int:
        """How many jobs run or wait before a queued one."""
        with self._database.reading() as db:
            row = db.execute(
                "SELECT COUNT(*) FROM jobs WHERE number < ? AND status IN (?, ?)", (job.number, QUEUED, IN_PROGRESS)
            )
            return int(row.fetchone()[0])

    def start_next(self) -> tuple[Job, JobParameters] | None:
        """Take the oldest queued job; None if there is none."""
        with self._transaction() as db:
            queued = table.jobs(db, "WHERE status = ? ORDER BY number LIMIT 1", QUEUED)
            if not queued:
                return None
            job_id = queued[0].id
            db.execute(
                "UPDATE jobs SET status = ?, tries = tries + 1, started_at = ? WHERE id = ?",
                (IN_PROGRESS, time.time(), job_id),
            )
            image = db.execute("SELECT image FROM jobs WHERE id = ?", (job_id,)).fetchone()[0]
            return table.required(db, job_id), JobParameters(**queued[0].parameters, image=image)

    def complete(self, job_id: str, result: dict[str, Any]) -> None:
        """The video lies at `video_path`; a job that was deleted meanwhile goes with it.

        Raises:
            OSError: the video is not on the disk.
        """
        path = self.video_path(job_id)
        flush(path)
        with self._transaction() as db:
            if table.required(db, job_id).cancelling:
                self._remove(db, job_id)
            else:
                table.complete(db, job_id, result, path.stat().st_size)
        self._database.shrink()

    def fail(self, job_id: str, error: JobError) -> None:
        """A job that was deleted meanwhile goes instead."""
        with self._transaction() as db:
            if table.required(db, job_id).cancelling:
                self._remove(db, job_id)
            else:
                table.fail(db, job_id, error)
                self._unneeded.append(job_id)
        self._database.shrink()

    def requeue(self, job_id: str) -> None:
        """Give back a job that was started and then interrupted by a shutdown; this was no try."""
        with self._transaction() as db:
            if table.required(db, job_id).cancelling:
                self._remove(db, job_id)
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
            job = table.required(db, job_id)
            if job.status != IN_PROGRESS:
                self._remove(db, job_id)
                return "deleted"
            if job.cancelling:
                raise ValueError(f"{job_id} is being cancelled already; it goes when its step has ended")
            db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ?", (job_id,))
            return "cancelling"

    def remove(self, job_id: str) -> None:
        """A job that was cancelled has stopped."""
        with self._transaction() as db:
            self._remove(db, job_id)
        self._database.shrink()

    def recover(self) -> dict[str, int]:
        """After a start: sort out what the last server left. How many jobs were requeued, failed, removed and found done."""
        done = {"requeued": 0, "failed": 0, "removed": 0, "found completed": 0}
        with self._transaction() as db:
            for job in table.jobs(db, "WHERE status = ?", IN_PROGRESS):
                done[self._recover_started(db, job)] += 1
            known = set()
            for job in table.jobs(db, "WHERE status = ?", COMPLETED):
                if self.video_path(job.id).is_file():
                    known.add(job.id)
                else:
                    table.fail(db, job.id, JobError("internal_error", "the file of this video is gone"))
                    done["failed"] += 1
        self._folder.sweep(known)
        return done

    def _recover_started(self, db: sqlite3.Connection, job: Job) -> str:
        """Decide on a job that was running when the last server stopped; what became of it."""
        path = self.video_path(job.id)
        if job.cancelling:
            self._remove(db, job.id)
            return "removed"
        if path.is_file() and path.stat().st_size > 0:  # saved whole, though the server did not come to write it down
            table.complete(db, job.id, {}, path.stat().st_size)
            return "found completed"
        if job.tries >= self._max_tries:
            text = f"the server stopped {job.tries} times while it made this video; see its log"
            table.fail(db, job.id, JobError("interrupted", text))
            return "failed"
        db.execute("UPDATE jobs SET status = ?, started_at = NULL WHERE id = ?", (QUEUED, job.id))
        return "requeued"

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
                    self._remove(db, job_id)
                    removed += 1
            return removed

    def _remove(self, db: sqlite3.Connection, job_id: str) -> None:
        db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self._unneeded.append(job_id)
