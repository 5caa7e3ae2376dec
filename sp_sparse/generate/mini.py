"""Where `mini` is: the small trained Wan that a checkout carries beside the package."""

from __future__ import annotations

from pathlib import Path

MINI = "mini"

_FOLDER = Path(__file__).resolve().parents[2] / "launch" / "mini" / "model"


def mini_folder(folder: Path = _FOLDER) -> Path:
    """The folder of its diffusers pipeline.

    Raises:
        ValueError: no weights there, as in an installed package.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"--model {MINI} (the default) has no weights in {folder}; run from a checkout that has them, train them as "
            "docs/mini.md tells, or give another --model: a Wan checkpoint, or tiny (random weights)"
        )
    return folder
