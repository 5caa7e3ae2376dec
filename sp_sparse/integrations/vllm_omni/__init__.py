"""SP_SPARSE, a diffusion attention backend of vllm-omni: sparse under Ulysses, ring, their hybrid and all-gather-KV.

vllm-omni finds `register` by entry point and calls it in every process. It makes the name known, its options readable, and
no more: no layer is imported from here, and nothing of vllm-omni runs otherwise, until a configuration asks for SP_SPARSE.
"""

from __future__ import annotations

from sp_sparse.integrations.vllm_omni.registration import BACKEND_NAME, register
from sp_sparse.integrations.vllm_omni.versions import SUPPORTED

__all__ = ["BACKEND_NAME", "SUPPORTED", "register"]
