"""Making the name SP_SPARSE known to vllm-omni: to its list of backends, and to its reading of `block_sparse`.

The plug-in meets inner parts of vllm-omni, so versions that it does not know are refused. Nothing heavy is imported here.
"""

from __future__ import annotations

import logging
import sys

from sp_sparse.integrations.vllm_omni.versions import wrong_version

logger = logging.getLogger(__name__)

BACKEND_NAME = "SP_SPARSE"
BACKEND_PATH = "sp_sparse.integrations.vllm_omni.backend.SparseAttentionBackend"


def register() -> None:
    """Entry point `vllm_omni.general_plugins`, called in every process of vllm-omni, perhaps more than once.

    An unknown version may serve models that have nothing to do with this backend, so it is no error yet; choosing
    SP_SPARSE is (`SparseAttentionBackend.validate_available`).
    """
    try:
        _register()
    except Exception as error:
        wrong = wrong_version()
        if wrong is None:
            raise
        logger.warning("%s is not registered (%s): %s", BACKEND_NAME, error, wrong)


def register_for_command_line() -> None:
    """Entry point `vllm.general_plugins`, for `vllm serve --omni` alone.

    It reads --diffusion-attention-config before it calls vllm-omni's own plug-ins, but after vllm's. Processes that
    serve language models have no use for vllm-omni's diffusion modules, and do not get them from here.
    """
    if "vllm_omni.entrypoints.cli.serve" in sys.modules:
        register()


def _register() -> None:
    from aenum import extend_enum
    from vllm_omni.diffusion import data
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

    if BACKEND_NAME not in DiffusionAttentionBackendEnum.__members__:
        # register_diffusion_backend replaces what members stand for, but adds none.
        extend_enum(DiffusionAttentionBackendEnum, BACKEND_NAME, BACKEND_PATH)
    # Read where an AttentionSpec is made, under this name.
    data.BLOCK_SPARSE_BACKENDS = data.BLOCK_SPARSE_BACKENDS | {BACKEND_NAME}
    from sp_sparse.integrations.vllm_omni.spec import take_options

    take_options(BACKEND_NAME)
