"""The videos of a job: those of each line of the prompt file, as arguments of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sp_sparse.flags import check_numbers, same_option
from sp_sparse.generate.arguments import GenerateArguments


def _own(name: str) -> Any:
    return same_option(GenerateArguments, name, default=None)


@dataclass(frozen=True)
class PromptLine:
    """A line of a .jsonl file; what is None comes from the flags.

    Raises:
        ValueError: a value of another type, or out of the bounds of the flag of the same name.
    """

    prompt: str | None = _own("prompt")
    negative_prompt: str | None = _own("negative_prompt")
    image: str | None = _own("image")
    last_image: str | None = _own("last_image")
    video: str | None = _own("video")
    strength: float | None = _own("strength")
    mask: str | None = _own("mask")
    reference_image: tuple[str, ...] | None = _own("reference_image")
    conditioning_scale: float | None = _own("conditioning_scale")
    height: int | None = _own("height")
    width: int | None = _own("width")
    num_frames: int | None = _own("num_frames")
    seed: int | None = _own("seed")
    lora: tuple[str, ...] | None = _own("lora")
    lora_2: tuple[str, ...] | None = _own("lora_2")
    lora_scale: tuple[float, ...] | None = _own("lora_scale")
    lora_scale_2: tuple[float, ...] | None = _own("lora_scale_2")

    def __post_init__(self) -> None:
        for names, kind, what in (
            (("lora", "lora_2"), str, "a text, or a list of texts"),
            (("lora_scale", "lora_scale_2"), int | float, "a number, or a list of numbers"),
        ):
            for name in names:
                value = getattr(self, name)
                every = value if isinstance(value, list | tuple) else () if value is None else (value,)
                if any(not isinstance(one, kind) or isinstance(one, bool) for one in every):
                    raise ValueError(f"{name} {value!r} is not {what}; give such a value")
                object.__setattr__(self, name, None if value is None else tuple(every))
        for name in ("prompt", "negative_prompt", "image", "last_image", "video", "mask"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} {value!r} is not a text; write it in quotes")
        images = self.reference_image
        if images is not None and not (isinstance(images, list) and all(isinstance(path, str) for path in images)):
            raise ValueError(f'reference_image {images!r} is not a list of texts; write ["cat.png"]')
        check_numbers(self, str)


@dataclass(frozen=True)
class WantedVideo:
    """One video of a job.

    Attributes:
        arguments: the job's, with what is this video's own.
        place: file and line that ask for it; empty where the flags do.
    """

    arguments: GenerateArguments
    place: str

    def error(self, error: ValueError) -> ValueError:
        """The same error, which also tells the file and the line."""
        return ValueError(f"{self.place}: {error}") if self.place else error


def wanted_videos(arguments: GenerateArguments, flag: str = "--prompt-file") -> tuple[WantedVideo, ...]:
    """`videos_per_prompt` for each prompt, with seeds that count up from its own; `flag` is what named the file.

    Raises:
        ValueError: a file that cannot be read or has no prompts, or such a line; with the file and the line.
    """
    found = []
    for place, line in _lines(arguments, flag):
        for number in range(arguments.videos_per_prompt):
            own = dict(line)
            own["seed"] = own.get("seed", arguments.seed) + number
            try:
                found.append(WantedVideo(replace(arguments, **own), place))
            except ValueError as error:
                raise (ValueError(f"{place}: {error}") if place else error) from error
    return tuple(found)


def _lines(arguments: GenerateArguments, flag: str) -> list[tuple[str, dict[str, Any]]]:
    if arguments.prompt_file is None:
        return [("", {})]
    path = Path(arguments.prompt_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(
            f"{flag} {path} cannot be read ({told}); give a text file in UTF-8, a prompt a line"
        ) from error
    texts = enumerate(text.splitlines(), start=1)
    lines = [(f"{path} line {number}", text.strip()) for number, text in texts if text.strip()]
    if not lines:
        raise ValueError(f"{flag} {path} has no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [(place, {"prompt": text}) for place, text in lines]
    return [(place, _read(place, text)) for place, text in lines]


def _read(place: str, text: str) -> dict[str, Any]:
    names = [entry.name for entry in fields(PromptLine)]
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{place} is not JSON ({error}); write {{"prompt": "a cat"}}') from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise ValueError(f'{place} has no "prompt"; write {{"prompt": "a cat"}}, and any of {", ".join(names)}')
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ValueError(f"{place} has unknown keys {', '.join(unknown)}; known are {', '.join(names)}")
    empty = sorted(key for key, value in values.items() if value is None)
    if empty:
        raise ValueError(f"{place}: {', '.join(empty)} is null; leave it out, so that the flag's value holds")
    try:
        line = PromptLine(**values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    own = {name: getattr(line, name) for name in values}
    # The flags' weights are those of the flags' sources.
    for sources, scales in (("lora", "lora_scale"), ("lora_2", "lora_scale_2")):
        if sources in own:
            own.setdefault(scales, ())
    return own
