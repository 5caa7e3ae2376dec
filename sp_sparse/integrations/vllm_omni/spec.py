"""What `block_sparse` of --diffusion-attention-config holds for SP_SPARSE: vllm-omni's own fields, and our options.

vllm-omni refuses fields that it does not know, and hands an implementation those alone. So where a configuration names
SP_SPARSE, and there alone, its specification gets classes of ours, which carry the options and whether a sparsity was given.
They are pickled by name: a worker needs no hook to read them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.data import AttentionSpec, BlockSparseSpec

from sp_sparse.integrations.vllm_omni.settings import BLOCK_SPARSE, check_names

_HOOKED = "__post_init__"
_MARK = "sp_sparse_options_hook"


@dataclass
class SparseSpec(BlockSparseSpec):
    """`block_sparse` of SP_SPARSE.

    Attributes:
        options: those of its entries that vllm-omni does not know.
        has_sparsity: whether it names a sparsity, which then goes before a preset's density.
    """

    options: dict[str, Any] = field(default_factory=dict)
    has_sparsity: bool = True

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> SparseSpec:
        """From the configuration's object.

        Raises:
            ValueError: an unknown name, or one that is said otherwise here.
        """
        own = {name: value for name, value in given.items() if name in BLOCK_SPARSE}
        options = {name: value for name, value in given.items() if name not in own}
        check_names(options, "block_sparse")
        return cls(**own, options=options, has_sparsity="sparsity" in own)


class SparseAttentionSpec(AttentionSpec):
    """The specification of a role that SP_SPARSE serves."""

    def backend_kwargs(self) -> dict[str, Any] | None:
        """vllm-omni's, with the options, and without a sparsity that nobody gave."""
        kwargs = super().backend_kwargs() or {}
        if isinstance(self.block_sparse, SparseSpec):
            if not self.block_sparse.has_sparsity:
                del kwargs["sparsity"]
            kwargs |= self.block_sparse.options
        return kwargs


def take_options(backend: str) -> None:
    """Let this backend's `block_sparse` hold our options; other backends' specifications are made as before. Idempotent."""
    original = getattr(AttentionSpec, _HOOKED)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def make(self: AttentionSpec) -> None:
        if isinstance(self.backend, str) and self.backend.upper() == backend:
            if self.block_sparse is None or isinstance(self.block_sparse, Mapping):
                self.block_sparse = SparseSpec.read(self.block_sparse or {})
            self.__class__ = SparseAttentionSpec
        original(self)

    setattr(make, _MARK, True)
    setattr(AttentionSpec, _HOOKED, make)
