"""A command on its ranks, and what it tells its user: errors on one line, the rest on rank 0 only."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from sp_sparse.generate.ranks import USER_ERRORS, Ranks, rank_from_environment, start_ranks
from sp_sparse.parallel.agreement import RefusedError, is_lost_rank

# The exit status of a command that ^C ended, as shells have it.
INTERRUPTED = 130

_PATIENCE_S = 5.0


def run_on_ranks(
    load: Callable[[], Callable[[Ranks], int]],
    device: str,
    timeout_s: float,
    debug: bool = False,
    on_stop: Callable[[], None] | None = None,
) -> int:
    """Start the ranks, do a job on them, and tell what goes wrong.

    Args:
        load: gives the job, of which the exit status comes back. It imports what is slow or may be missing: only then, since
            some packages read the environment at their import; where it fails on one rank, all of them hear of it.
        device, timeout_s, on_stop: as `start_ranks` takes them.
        debug: show the traceback of an error.

    Returns:
        The exit status: the job's; 1 if a rank was lost, or for an error of ours, with its traceback; 2 for an error of the
        user's; `INTERRUPTED`.
    """
    try:
        with start_ranks(device, timeout_s, on_stop) as ranks:
            try:
                return ranks.together(load)(ranks)
            except RefusedError as refused:
                # Leaving the block waits for all ranks: torchrun stops those that have not spoken when one has left.
                if refused.speaks:
                    report_error(refused, timeout_s, debug)
                return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except USER_ERRORS as error:
        return report_error(error, timeout_s, debug)
    except Exception:
        traceback.print_exc()
        return 1


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
