"""What the page shows of videos and masks, as data URIs: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sp_sparse.fidelity.metrics import as_float
from sp_sparse.fidelity.store import Frames
from sp_sparse.generate.files import save_video

# Pixels of the shorter side of what the page shows; a codec wants multiples of 16.
_SIDE = 256
_SHEET_FRAMES, _SHEET_SIDE = 6, 112


def data_uri(kind: str, content: bytes) -> str:
    """`kind` such as `image/png`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video_uri(frames: Frames, fps: int) -> str:
    """A small mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        save_video(_shrunk(frames, _SIDE, 16), path, fps)
        return data_uri("video/mp4", path.read_bytes())


def contact_sheet_uri(frames: Frames) -> str:
    """Six frames of the video in a row."""
    chosen = np.linspace(0, len(frames) - 1, min(_SHEET_FRAMES, len(frames))).round().astype(int)
    small = (_shrunk(frames[chosen], _SHEET_SIDE, 1) * 255).round().to(torch.uint8).numpy()
    return _image_uri(np.concatenate(list(small), axis=1), "JPEG")


def mask_uri(masks: NDArray[np.bool_]) -> str:
    """The masks `[heads, Nq, Nk]` side by side, dark where a block is kept."""
    heads, rows, columns = masks.shape
    picture = np.full((rows, heads * (columns + 2) - 2), 200, dtype=np.uint8)
    for head, mask in enumerate(masks):
        picture[:, head * (columns + 2) :][:, :columns] = np.where(mask, 20, 255)
    return _image_uri(picture, "PNG")


def _image_uri(pixels: NDArray[Any], form: str) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=form)
    return data_uri(f"image/{form.lower()}", file.getvalue())


def _shrunk(frames: Frames, side: int, multiple: int) -> torch.Tensor:
    """`[T, H, W, 3]` in [0, 1], the shorter side no longer than `side`."""
    height, width = frames.shape[1:3]
    factor = min(1.0, side / min(height, width))
    size = [max(round(pixels * factor / multiple), 1) * multiple for pixels in (height, width)]
    images = as_float(frames).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(images, size=size, mode="area").permute(0, 2, 3, 1)
