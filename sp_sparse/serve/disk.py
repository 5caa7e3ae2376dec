"""What a disk refuses: the errors of the store, and how a disk that is full is told from one that is broken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sp_sparse.generate.files import NO_ROOM

# A disk with less is full: SQLite tells some of its failed writes without saying why.
_ROOM_BYTES = 1 << 16


class StoreError(RuntimeError):
    """The database cannot be read or written now; nothing has changed."""


class NoRoomError(StoreError):
    """The disk is full; nothing has changed."""


def is_no_room(error: BaseException) -> bool:
    """Whether the disk, or a share of it, is full."""
    return isinstance(error, NoRoomError) or (isinstance(error, OSError) and error.errno in NO_ROOM)


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has next to no room; False where it does not say."""
    try:
        return shutil.disk_usage(folder).free < _ROOM_BYTES
    except OSError:
        return False


def flush(path: Path) -> None:
    """Have a file and its name on the disk.

    Raises:
        OSError: it is not there, or the disk refuses it.
    """
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
