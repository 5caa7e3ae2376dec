"""Which vllm-omni the plug-in knows, and what it expects of its inner parts: the one place where versions differ.

Nothing of vllm-omni is imported when this module is.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Series whose inner parts were read and whose tests pass, each with our extra that installs it and vllm of the same series.
SUPPORTED = {"0.30": "vllm", "0.32": "vllm-rc"}

_LAYER = "vllm_omni.diffusion.attention.layer"
_ABSTRACT = "vllm_omni.diffusion.attention.backends.abstract"
_CALL = ("query", "key", "value", "attn_metadata")

# What the plug-in replaces, overrides or calls, by module and name, and the parameters that it does so with. The same in all
# supported series; a series that differs would be told apart here.
_EXPECTED: dict[tuple[str, str], tuple[str, ...]] = {
    (_LAYER, "Attention._run_ring_attention"): ("self", *_CALL),
    (_LAYER, "Attention._forward_impl"): ("self", *_CALL),
    (_ABSTRACT, "AttentionImpl.forward"): ("self", *_CALL),
    (_ABSTRACT, "AttentionImpl.forward_cuda"): ("self", *_CALL),
    (_ABSTRACT, "AttentionBackend.supports_attention_mask"): ("attention_spec",),
    (_ABSTRACT, "VideoTokenLayout"): ("prefix_len", "latent_grid", "used_len", "video_spans"),
    ("vllm_omni.diffusion.attention.selector", "_cached_get_backend_cls"): (
        "backend_name",
        "head_size",
        "allow_trtllm_default",
    ),
    ("vllm_omni.diffusion.attention.parallel.ring", "RingParallelAttention"): (
        "sp_group",
        "attn_backend_pref",
        "attn_backend_explicit",
    ),
    ("vllm_omni.diffusion.attention.parallel.ring", "RingParallelAttention.run_attention"): (
        "self",
        *_CALL,
        "softmax_scale",
        "causal",
    ),
    ("vllm_omni.diffusion.data", "AttentionSpec.__post_init__"): ("self",),
    ("vllm_omni.diffusion.data", "AttentionSpec.backend_kwargs"): ("self",),
    ("vllm_omni.diffusion.data", "BlockSparseSpec"): (
        "sparsity",
        "start_step",
        "end_step",
        "precision",
        "skip_layers",
        "skip_layer_indices",
    ),
}


def wrong_version() -> str | None:
    """What is wrong with the installed vllm-omni, and what was expected; None if nothing is."""
    ways = " or ".join(f'pip install "sp-sparse[{extra}]" for {series}' for series, extra in SUPPORTED.items())
    expected = f"SP_SPARSE knows vllm-omni {' and '.join(f'{series}.*' for series in SUPPORTED)}; {ways}"
    try:
        found = version("vllm-omni")
    except PackageNotFoundError:
        return f"vllm-omni is not installed; {expected}"
    if _series(found) not in SUPPORTED:
        return f"vllm-omni {found} is installed, but {expected}"
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        return f"vllm-omni {found} is installed without vllm; {expected}"
    if _series(vllm) != _series(found):
        return f"vllm-omni {found} is installed with vllm {vllm}, but goes with vllm {_series(found)}.*; {expected}"
    return None


def check_version() -> None:
    """Refuse a version that is not known.

    Raises:
        RuntimeError: with the version found and those expected.
    """
    wrong = wrong_version()
    if wrong is not None:
        raise RuntimeError(wrong)


def check_interface() -> None:
    """Refuse a vllm-omni whose inner parts are not those that were read, whatever its version says.

    Raises:
        RuntimeError: with the part, its parameters and those expected.
    """
    for (module, name), expected in _EXPECTED.items():
        part: Any = importlib.import_module(module)
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        found = _parameters(part)
        if found != expected:
            raise RuntimeError(
                f"vllm-omni {version('vllm-omni')} is not as SP_SPARSE knows it: {module}.{name} has parameters "
                f"{None if found is None else list(found)}, expected {list(expected)}; install an unchanged vllm-omni "
                f"{' or '.join(SUPPORTED)}, or choose another attention backend"
            )


def _parameters(part: Any) -> tuple[str, ...] | None:
    return tuple(inspect.signature(part).parameters) if callable(part) else None


def _series(found: str) -> str:
    return ".".join(found.split(".")[:2])
