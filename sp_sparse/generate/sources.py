"""Pictures and videos that a video starts from, as files: what they are, and their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp_sparse.flags import flag_of


@dataclass(frozen=True)
class Clip:
    """A video file.

    Attributes:
        size: width and height, as it is meant to be seen.
        frames: how many it has, or `at_most` where it has more.
        fps: frames a second; 0 where the file does not tell.
    """

    size: tuple[int, int]
    frames: int
    fps: float


def check_picture(name: str, path: str) -> None:
    """Refuse what is no picture.

    Raises:
        ValueError: with the flag of this name.
    """
    if not Path(path).is_file():
        raise ValueError(f"{flag_of(name)} {path} is not a file; give a picture")
    picture_size(path, name)


def picture_size(path: str, name: str = "image") -> tuple[int, int]:
    """Width and height, as the picture is meant to be seen; all of it is read.

    Raises:
        ValueError: it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            size: tuple[int, int] = ImageOps.exif_transpose(image).size
            return size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{flag_of(name)} {path} cannot be read ({error}); give a PNG, JPEG or WebP picture"
        ) from error


def open_picture(path: str) -> Any:
    """The picture as it is meant to be seen, without transparency."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def look_at_clip(path: str, at_most: int, name: str = "video") -> Clip:
    """What a video file is, of which no more than `at_most` frames are decoded. A picture is one of a single frame.

    Raises:
        ValueError: it is no video that ffmpeg reads.
    """
    if not Path(path).is_file():
        raise ValueError(f"{flag_of(name)} {path} is not a file; give a video")
    with _decoding(path, at_most, name) as (facts, frames):
        count = sum(1 for _ in frames)
    if count < 1:
        raise ValueError(f"{flag_of(name)} {path} has no frame that can be decoded; give a whole mp4, WebM or GIF")
    return Clip(facts["size"], count, float(facts["fps"]))


def read_clip(path: str, count: int) -> list[Any]:
    """The first `count` frames, as pictures."""
    from PIL import Image

    with _decoding(path, count, "video") as (facts, frames):
        return [Image.frombytes("RGB", facts["size"], frame) for frame in frames]


@contextmanager
def _decoding(path: str, at_most: int, name: str) -> Iterator[tuple[dict[str, Any], Iterator[bytes]]]:
    """What ffmpeg tells of a file, and its frames as bytes of RGB."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(path, output_params=["-frames:v", str(at_most)])
    try:
        yield next(reader), reader
    except (OSError, RuntimeError, StopIteration) as error:
        told = str(error).strip().splitlines()
        raise ValueError(
            f"{flag_of(name)} {path} cannot be read ({told[-1] if told else type(error).__name__}); give an mp4, WebM or GIF"
        ) from error
    finally:
        reader.close()
