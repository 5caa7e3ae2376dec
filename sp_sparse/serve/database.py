"""The SQLite file of the jobs: opened if it is ours and whole, changed in transactions, its failures told in words."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sp_sparse.serve import table
from sp_sparse.serve.disk import NoRoomError, StoreError, is_full
from sp_sparse.serve.folder import DataFolder

_VERSION = 1

# In the header of the database: who made it.
_APPLICATION = int.from_bytes(b"spSV", "big")


class Database:
    """The database of a locked folder, for any thread.

    Attributes:
        lock: held in `reading` and `writing`; may be held around them.
    """

    def __init__(self, folder: DataFolder) -> None:
        """Open or make it.

        Raises:
            ValueError: it is broken, not this server's, or a newer version wrote it; it is as it was.
            StoreError: it cannot be opened, for one because the disk is full.
        """
        self.lock = threading.RLock()
        self._folder = folder
        with self._told():
            self._db = sqlite3.connect(folder.database, check_same_thread=False, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        """Look whose the database is before anything is written."""
        # The folder is locked: without shared memory, which is a file, there is a start on a full disk.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = self._check_own()
        if is_new:
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if is_new:  # else nothing is written, for which a full disk has no room
            self._db.executescript(table.SCHEMA)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _check_own(self) -> bool:
        """Whether the database has yet to be made, or marked as this server's.

        Raises:
            ValueError: it cannot be used.
        """
        folder = self._folder
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
                f"{folder.database} is no database, or broken ({' '.join(broken.split())}); move it and {folder.videos} "
                "away (the videos there remain whole), or give another --data-dir"
            )
        if names and application != _APPLICATION and (application != 0 or not columns >= table.OWN_COLUMNS):
            raise ValueError(
                f"{folder.database} is not this server's: it was made by another program; move it away, or give another "
                "--data-dir"
            )
        if version > _VERSION:
            raise ValueError(
                f"{folder.path} has format {version}, but this server reads up to {_VERSION}; update sp_sparse"
            )
        return (application, version) != (_APPLICATION, _VERSION)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Look something up.

        Raises:
            StoreError: SQLite cannot.
        """
        with self._told():
            yield self._db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk at the end, or nothing has changed.

        Raises:
            StoreError: SQLite cannot.
        """
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise

    def shrink(self) -> None:
        """Give back the room of pictures that are not needed any more; nothing depends on it."""
        with self.lock, suppress(sqlite3.Error):
            self._db.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says, as an error of the store that tells whether the disk is full."""
        with self.lock:
            try:
                yield
            except sqlite3.Error as error:
                folder = self._folder
                if "full" in str(error) or is_full(folder.path):
                    text = f"the disk of {folder.path} is full ({error}); make room there"
                    raise NoRoomError(text) from error
                text = f"{folder.database} cannot be used now ({error}); see whether its disk is well"
                raise StoreError(text) from error
