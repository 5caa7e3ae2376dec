"""`vllm serve --omni` where parts of its installation are missing that a video of Wan does not need.

Without a network, or on a CPU, there may be vllm's Python part alone. Each package below that is not installed gets an empty
one in its place, which only importing the server asks for; one that is installed is left as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import io
import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Imported by parts of the server that are not run here; large, or without a build for a CPU.
MISSING = (
    "av",
    "cache_dit",
    "model_hosting_container_standards",
    "prometheus_fastapi_instrumentator",
    "torchaudio",
    "torchvision",
)


class _Nothing(type):
    """A class each of whose attributes is itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Nothing(metaclass=_Nothing):
    """Every class, function and decorator of a package that is not there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments else self

    def _chain(self, *_: Any, **__: Any) -> Nothing:
        return self

    add = instrument = expose = _chain


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages, empty."""

    def __init__(self, packages: Iterable[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _attribute(name: str) -> Any:
    if name == "bootstrap":  # of an application, which is to come back
        return lambda app: app
    return getattr(Nothing, name) and Nothing


def stand_in() -> tuple[str, ...]:
    """Put an empty package in the place of each that is missing. Call it before vllm is imported.

    Returns:
        The packages that are missing.
    """
    missing = tuple(name for name in MISSING if importlib.util.find_spec(name) is None)
    if "torchvision" in missing:
        import transformers.utils.import_utils as found

        for name in ("is_torchvision_available", "is_torchvision_v2_available", "is_torchvision_greater_or_equal"):
            setattr(found, name, lambda *_, **__: False)
    sys.meta_path.append(_Absent(missing))
    return missing


def videos_without_av() -> None:
    """Videos leave the server as animated PNGs, which lose nothing, instead of MP4. vllm-omni has its platform by now."""
    from vllm_omni.diffusion.utils import media_utils
    from vllm_omni.entrypoints.openai import video_api_utils

    video_api_utils._direct_planar_fallback_reason = lambda *_, **__: "av is not installed"
    media_utils.mux_video_audio_bytes = _animated_png


def _animated_png(frames: NDArray[np.uint8], *_: Any, fps: float, **__: Any) -> bytes:
    """Frames `[T, H, W, 3]` as one file."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=rest, duration=1000 / fps)
    return file.getvalue()
