"""Files that are written whole or not at all, and mp4s."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# What a disk says that is full, or a share or file of it.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A disk with less is full.
_ROOM_BYTES = 1 << 16


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the writing has ended well.

    Raises:
        OSError: `path` is a device or the like, whose place no file may take.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file; choose another path")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try it.

    Raises:
        OSError: it cannot be written; the text says why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is a folder" if path.is_dir() else "it is no regular file")
        probe = path.with_name(f".{path.stem}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); choose another path") from error


def numbered(path: Path, number: int, count: int) -> Path:
    """`video.mp4` -> `video_0.mp4`, where there are several."""
    return path if count == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def save_video(frames: Tensor, path: Path, fps: int) -> None:
    """Write an mp4."""
    from diffusers.utils import export_to_video

    with whole_file(path) as temporary:
        try:
            export_to_video(list(frames.numpy()), str(temporary), fps=fps)
            _check_whole(temporary)
        except OSError as error:
            # The encoder is a process of its own: its errors have no number.
            if "No space left" in str(error) or shutil.disk_usage(path.parent).free < _ROOM_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise


def save_tensor(tensor: Tensor, path: Path) -> None:
    """Write a .pt.

    Raises:
        OSError: it could not be written whole.
    """
    import torch

    with whole_file(path) as temporary:
        try:
            torch.save(tensor, temporary)
        except RuntimeError as error:  # of torch's own writer, which does not tell what the disk said
            raise OSError(f"{path} could not be written whole ({error}); see whether the disk has room") from error


def _check_whole(path: Path) -> None:
    """The encoder does not tell when the end of its file could not be written.

    Raises:
        OSError: the boxes of an mp4 do not end where the file does, or its index is missing.
    """
    size, at, names = path.stat().st_size, 0, []
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8 or at + length > size:
                break
            names.append(head[4:8])
            at += length
    if at != size or b"moov" not in names:
        raise OSError(f"{path} was cut off at {size} bytes while it was written; see whether the disk has room")


def decoded_pixels(video: bytes) -> bytes:
    """All pixels of an mp4, in a row of bytes."""
    import imageio_ffmpeg

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(video)
        file.flush()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", file.name, "-f", "rawvideo", "-"]
        return subprocess.run(command, capture_output=True, check=True).stdout
