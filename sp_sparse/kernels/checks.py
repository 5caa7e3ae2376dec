"""What compiled kernels do before they launch: see whether their package is there, refuse what would be wrong, and answer
what needs no launch."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from sp_sparse.mask import BlockMask


def check_tensors(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> None:
    """Refuse what would read or write out of bounds.

    Raises:
        ValueError: shapes that do not fit the mask; a last dimension that is not contiguous.
    """
    batch, query_length, heads, head_dim = query.shape
    expected = (batch, mask.key_length, heads, head_dim)
    if query_length != mask.query_length or key.shape != expected or value.shape != expected:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit a mask over "
            f"{mask.query_length} x {mask.key_length} tokens; expected [B, Sq, H, D] and [B, Sk, H, D]"
        )
    if mask.counts.shape[:2] != (batch, heads):
        raise ValueError(f"the mask is for (batch, heads) {tuple(mask.counts.shape[:2])}, query has {(batch, heads)}")
    if any(x.stride(3) != 1 for x in (query, key, value)):
        raise ValueError("the last dimension of query, key and value must be contiguous; call .contiguous()")


def without_launch(query: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor] | None:
    """The result where nothing is attended at all (no queries, no heads, a table of width 0), or None elsewhere.

    Returns:
        out: zeros `[B, Sq, H, D]` in the dtype of `query`.
        lse: `-inf`, fp32, `[B, H, Sq]`.
    """
    if query.numel() and mask.indices.shape[3]:
        return None
    batch, query_length, heads, _ = query.shape
    lse = torch.full((batch, heads, query_length), float("-inf"), dtype=torch.float32, device=query.device)
    return torch.zeros(query.shape, dtype=query.dtype, device=query.device), lse


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """`query` and a scale above 0 with the same scores: kernels scale a row's largest score, -inf included, instead of
    looking for the largest scaled one."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (torch.zeros_like(query), 1.0)


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
