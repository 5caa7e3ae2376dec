"""The table of jobs: its columns, a `Job` from a row of it, and the changes that a job goes through.

All functions work within the transaction of their caller.
"""

from __future__ import annotations

import json
import time
from sqlite3 import Connection
from typing import Any

from sp_sparse.serve.jobs import COMPLETED, FAILED, Job, JobError

SCHEMA = """
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

# By these a table of ours is known whose database is not marked yet.
OWN_COLUMNS = {
    *("number", "id", "status", "cancelling", "tries", "created_at", "started_at", "completed_at", "parameters"),
    *("image", "error_code", "error_message", "result", "bytes"),
}

# Without the picture itself, which may be large.
_COLUMNS = (
    "number, id, status, cancelling, tries, created_at, started_at, completed_at, parameters, error_code, error_message, "
    "result, image IS NOT NULL"
)


def jobs(db: Connection, where: str, *values: Any) -> list[Job]:
    """The jobs that an SQL text, from `WHERE` or `ORDER BY` on, asks for."""
    return [_job(row) for row in db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchall()]


def find(db: Connection, job_id: str) -> Job | None:
    """The job of this name; None if there is none."""
    return next(iter(jobs(db, "WHERE id = ?", job_id)), None)


def required(db: Connection, job_id: str) -> Job:
    """The job of this name.

    Raises:
        KeyError: there is none.
    """
    job = find(db, job_id)
    if job is None:
        raise KeyError(job_id)
    return job


def counts(db: Connection) -> dict[str, int]:
    """Jobs in each state that any is in."""
    return dict(db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall())


def complete(db: Connection, job_id: str, result: dict[str, Any], size: int) -> None:
    """A job has ended with a video of `size` bytes; it needs its picture no longer."""
    db.execute(
        "UPDATE jobs SET status = ?, completed_at = ?, result = ?, bytes = ?, image = NULL WHERE id = ?",
        (COMPLETED, time.time(), json.dumps(result), size, job_id),
    )


def fail(db: Connection, job_id: str, error: JobError) -> None:
    """A job has ended, or is found, without a video; it needs its picture no longer."""
    db.execute(
        "UPDATE jobs SET status = ?, completed_at = ?, error_code = ?, error_message = ?, image = NULL, bytes = 0 "
        "WHERE id = ?",
        (FAILED, time.time(), error.code, error.message, job_id),
    )


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
