"""Which versions of vllm-omni the plug-in knows. It meets their inner parts, so others are refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# Versions that begin so: 0.30.0, 0.30.1, …
SUPPORTED = "0.30"


def wrong_version() -> str | None:
    """What is wrong with the installed vllm-omni, and what was expected; None if nothing is."""
    expected = f'SP_SPARSE knows vllm-omni {SUPPORTED}.*; pip install "sp-sparse[vllm]"'
    try:
        found = version("vllm-omni")
    except PackageNotFoundError:
        return f"vllm-omni is not installed; {expected}"
    if not f"{found}.".startswith(f"{SUPPORTED}."):
        return f"vllm-omni {found} is installed, but {expected}"
    return None


def check_version() -> None:
    """Refuse a version that is not known.

    Raises:
        RuntimeError: with the version found and those expected.
    """
    wrong = wrong_version()
    if wrong is not None:
        raise RuntimeError(wrong)
