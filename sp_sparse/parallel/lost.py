"""Telling a rank that was lost from an error of this one."""

from __future__ import annotations

import torch.distributed as dist


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank stopped or did not answer."""
    # gloo raises plain RuntimeErrors, recognisable by their source file alone.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
