"""Attributes of an instance in front of its class's, which other libraries may wrap in their turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Shadows:
    """The methods of one model that are replaced on the instance.

    What another library has put in front since stays there: a replacement that it holds passes calls on, once removed, to
    what stood there before.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.removed = False

    def place(self, name: str, replace: Callable[[Any], Any]) -> None:
        """Put `replace(method)` in front of the method, unless it is foremost already."""
        if not self._is_ours(self._model.__dict__.get(name)):
            before = self._model.__dict__.get(name, _MISSING)
            method = getattr(self._model, name)
            self._model.__dict__[name] = _Shadow(self, before, method, replace(method))

    def remove(self) -> None:
        """Take away what is foremost, and what accelerate keeps to put back when its hook is removed."""
        self.removed = True
        attributes = self._model.__dict__
        for name, found in list(attributes.items()):
            while self._is_ours(found):
                found = found.method if name == "_old_forward" else found.before
                attributes[name] = found
            if found is _MISSING:
                del attributes[name]

    def _is_ours(self, found: Any) -> bool:
        return isinstance(found, _Shadow) and found.shadows is self


class _Shadow:
    def __init__(self, shadows: Shadows, before: Any, method: Any, replacement: Any) -> None:
        self.shadows, self.before, self.method, self._replacement = shadows, before, method, replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.method if self.shadows.removed else self._replacement)(*args, **kwargs)
