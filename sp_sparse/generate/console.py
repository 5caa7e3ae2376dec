"""What a command tells its user: errors on one line, the rest on rank 0 only."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

from sp_sparse.generate.ranks import rank_from_environment
from sp_sparse.parallel.agreement import is_lost_rank

_PATIENCE_S = 5.0


def tell(text: str) -> None:
    """An error, on one line."""
    rank = rank_from_environment()
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def refuse_arguments(error: Exception) -> int:
    """Tell that the arguments, or what is installed, will not do; returns the exit status."""
    if rank_from_environment() != 0:
        # Rank 0 has the same arguments, fails alike and is followed by torchrun stopping this one: no need to repeat.
        time.sleep(_PATIENCE_S)
    tell(str(error))
    return 2


def report_error(error: Exception, timeout_s: float, debug: bool) -> int:
    """Tell an error; returns the exit status, 1 for a rank that was lost and 2 for an error of the user's."""
    if debug:
        traceback.print_exception(error)
    if is_lost_rank(error):
        tell(
            f"a rank stopped or did not answer within {timeout_s:g} s; see the first error of the other ranks, "
            f"or give --timeout-s more ({str(error).splitlines()[0]})"
        )
        return 1
    tell(str(error))
    return 2


def be_quiet(first: bool) -> None:
    """Leave progress, logs and warnings to rank 0."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if first:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("sp_sparse").setLevel(logging.INFO)  # which kernel `auto` chose
    else:
        warnings.simplefilter("ignore")
        os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def require_packages(command: str, extra: str, packages: Sequence[str]) -> None:
    """Refuse to start without what `extra` installs; nothing of it is imported yet.

    Raises:
        ValueError: with the packages that are missing, and how to install them.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise ValueError(
            f'{command} needs {", ".join(missing)}; pip install "sp-sparse[{extra}]" from a checkout or wheel'
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
