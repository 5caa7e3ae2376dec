"""What the pictures share: colours, names and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sp_sparse.generate.files import whole_file

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#bbbbbb")  # Paul Tol's, for the colour-blind


def prepare(folder: Path) -> None:
    """Make the folder for pictures.

    Raises:
        ValueError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed, and pictures need it; pip install 'sp-sparse[benchmark]'"
        ) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)


def mesh_name(row: dict[str, Any]) -> str:
    if row["gpus"] == 1:
        return "1 rank"
    return f"U{row['ulysses']}×R{row['ring']}{' all-gather' if row.get('kv_exchange') == 'all_gather' else ''}"


def mode_name(row: dict[str, Any]) -> str:
    """Of a transformer; nothing for what has no modes."""
    return {None: "", True: ", compiled", False: ", eager"}[row.get("compiled")]


def title(row: dict[str, Any], what: str) -> str:
    return f"{row.get('hardware', '')}, {row['sequence']:,} tokens: {what}".lstrip(", ")


def save(figure: Any, path: Path) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
