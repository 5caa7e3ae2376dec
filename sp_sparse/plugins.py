"""Finding a class by name: built in, offered by another installed package, or by its path `package.module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@dataclass(frozen=True)
class Plugins:
    """One kind of class that can be named.

    Attributes:
        kind: what errors call it, such as "sparse attention backend".
        group: the entry-point group through which other packages offer theirs.
        built_in: name -> class path.
        other_names: names with a meaning of their own, which errors list too.
        methods: that such a class has.
    """

    kind: str
    group: str
    built_in: Mapping[str, str] = field(hash=False)
    other_names: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Built-in names, then those that other installed packages offer."""
        return (*self.built_in, *sorted(self._offered()))

    def load(self, name: str) -> type[Any]:
        """The class called `name`.

        Raises:
            ValueError: nothing has this name (those that are known are listed), or what it names cannot be imported or is
                no such class.
        """
        point = self._offered().get(name)
        path = self.built_in.get(name, name)
        if point is None and ":" not in path:
            raise ValueError(
                f"unknown {self.kind} {name!r}; use one of {', '.join((*self.other_names, *self.names()))}, "
                "or a class path package.module:Class"
            )
        try:
            if point is not None:
                found: type[Any] = point.load()
            else:
                module, _, attribute = path.partition(":")
                found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{self.kind} {name!r} cannot be loaded: {error}") from error
        # Of the class itself: what has no __call__ is called by its metaclass.
        own = {method for kind in found.__mro__ for method in vars(kind)} if isinstance(found, type) else set()
        if not isinstance(found, type) or not own.issuperset(self.methods):
            raise ValueError(
                f"{self.kind} {name!r} is no class with {', '.join(self.methods)}; give package.module:Class of one, or use "
                f"one of {', '.join((*self.other_names, *self.names()))}"
            )
        return found

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.built_in}
