"""Whether the package behind an optional kernel can be used."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

from torch.torch_version import TorchVersion


@functools.cache
def missing_package(distribution: str, module: str, minimum: str, extra: str) -> str | None:
    """Why `module` cannot be used, with what to install, or None.

    The module is imported only where its package is installed and new enough. What an import raises is told, not hidden.

    Args:
        distribution: name of the package as pip knows it.
        module: what is imported from it.
        minimum: oldest version that will do.
        extra: the extra of sp-sparse that installs it.
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f'{distribution} is not installed; pip install "sp-sparse[{extra}]"'
    if TorchVersion(found) < minimum:
        return f'{distribution} {found} is older than {minimum}; pip install --upgrade "sp-sparse[{extra}]"'
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything: OSError, RuntimeError, AttributeError, …
        return f"{distribution} {found} is installed but cannot be imported: {type(error).__name__}: {error}"
    return None
