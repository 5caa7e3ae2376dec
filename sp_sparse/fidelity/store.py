"""The folder of the results: what was measured, a line a video, and the frames that are compared or shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from sp_sparse.fidelity.plan import Setting, key_of
from sp_sparse.generate.files import NO_ROOM, whole_file

# What a line is about: the model's own attention, the same by another kernel, or a setting.
DENSE, FLOOR, SPARSE = "dense", "floor", "sparse"

# What every line has, for what is told of them all.
NEEDED = ("kind", "prompt", "seed", "setting", "density", "density_all", "seconds", "psnr", "ssim", "lpips", "caption")

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Item:
    """One video to make.

    Attributes:
        kind: DENSE, FLOOR or SPARSE.
        prompt, seed: of the video.
        setting: what is sparse; None unless SPARSE.
    """

    kind: str
    prompt: str
    seed: int
    setting: Setting | None = None

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Item:
        setting = None if line["setting"] is None else Setting.from_json(line["setting"])
        return cls(line["kind"], line["prompt"], line["seed"], setting)

    @property
    def name(self) -> str:
        """Of its files."""
        setting = None if self.setting is None else self.setting.to_json()
        return f"{self.kind}-{key_of(self.prompt, self.seed, setting)}"


class ResultStore:
    """The folder, as rank 0 alone holds it.

    `run.json` says what all videos share; `fidelity.jsonl` has a line a video, each on the disk before the next video
    begins; `frames/` and `masks/` hold arrays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines_path = folder / "fidelity.jsonl"

    def open(self, run: Mapping[str, Any]) -> None:
        """Begin, or go on with what is there; a last line that was cut off is removed.

        Args:
            run: what all videos of the folder must share.

        Raises:
            ValueError: the folder was begun with something else, or its files cannot be read.
            OSError: it cannot be written.
        """
        with _room(self.folder):
            for part in ("frames", "masks"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        if path.exists():
            self._check_same(_read_run(path), run)
        else:
            with self._whole_file(path) as temporary:
                temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if self.lines_path.exists():
            with _room(self.folder), self.lines_path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self.lines()

    def _check_same(self, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        differing = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        if differing:
            told = "; ".join(f"{name} {before.get(name)!r} there, {run.get(name)!r} now" for name in differing)
            raise ValueError(
                f"--output {self.folder} holds videos that cannot be compared with these: {told}; give the same again, or "
                "another --output"
            )

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, and wait until it is on the disk."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with _room(self.folder), self.lines_path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """All lines, one for each video.

        Raises:
            ValueError: a line that is none of ours.
        """
        if not self.lines_path.exists():
            return []
        found: dict[Item, dict[str, Any]] = {}
        for number, text in enumerate(self.lines_path.read_bytes().splitlines(), 1):
            try:
                line = json.loads(text)
                found[Item.of_line({name: line[name] for name in NEEDED})] = line
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.lines_path}:{number} cannot be read ({error}); remove this line, and its video is made again"
                ) from error
        return list(found.values())

    def done(self) -> set[Item]:
        """The videos that need not be made again; a dense one only if its frames are there to compare with."""
        found = {Item.of_line(line) for line in self.lines()}
        return {item for item in found if item.kind != DENSE or self.frames(item) is not None}

    def keep_frames(self, item: Item, frames: Frames) -> None:
        """Store `[T, H, W, 3]`, lossless."""
        with self._whole_file(self._array_path("frames", item.name)) as temporary:
            np.savez_compressed(temporary, frames=frames)

    def frames(self, item: Item) -> Frames | None:
        """What `keep_frames` stored; None if it is not there or cannot be read."""
        arrays = _load(self._array_path("frames", item.name))
        return None if arrays is None else arrays["frames"]

    def keep_masks(self, setting: Setting, prompt: str, arrays: Mapping[str, Any]) -> None:
        """Store what was seen of the masks of a setting."""
        with self._whole_file(self._array_path("masks", key_of(prompt, setting.to_json()))) as temporary:
            np.savez_compressed(temporary, **arrays)

    def masks(self, setting: Setting, prompt: str) -> dict[str, NDArray[Any]] | None:
        """What `keep_masks` stored; None if it is not there or cannot be read."""
        return _load(self._array_path("masks", key_of(prompt, setting.to_json())))

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write files by their names."""
        for name, content in files.items():
            with self._whole_file(self.folder / name) as temporary:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)

    @contextmanager
    def _whole_file(self, path: Path) -> Iterator[Path]:
        with _room(self.folder), whole_file(path) as temporary:
            yield temporary

    def _array_path(self, part: str, name: str) -> Path:
        return self.folder / part / f"{name}.npz"


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path} cannot be read ({told}); give another --output") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not what a run was begun with; give another --output")
    return found


def _load(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (FileNotFoundError, BadZipFile, ValueError, EOFError):
        return None


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Tell what to do when the disk is full, or the folder cannot be used."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it tells already
            raise
        if error.errno not in NO_ROOM:
            raise OSError(f"--output {folder} cannot be used ({error.strerror}); give another --output") from error
        raise OSError(
            f"the disk of {folder} is full; free some room and start the same command again: it goes on after the last "
            "video that was measured"
        ) from error
