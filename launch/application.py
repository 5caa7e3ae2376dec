"""The command: from its arguments to its exit status."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from launch.arguments import GenerateArguments, parse_arguments
from launch.ranks import USER_ERRORS, RefusedError, is_lost_rank, rank_from_environment, start_ranks

_PATIENCE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Generate videos.

    Returns:
        0; 1 if `--verify` failed or another rank stopped; 2 for an error of the user's.
    """
    rank = rank_from_environment()
    try:
        arguments = parse_arguments(argv)
    except (ValueError, OSError) as error:
        if rank != 0:
            # Rank 0 has the same arguments, fails alike and is followed by torchrun stopping this one: no need to repeat.
            time.sleep(_PATIENCE_S)
        _tell(str(error))
        return 2
    _be_quiet(rank == 0)
    try:
        from launch.job import generate  # here, for diffusers reads the environment when it is imported

        with start_ranks(arguments.device, arguments.timeout_s) as ranks:
            try:
                return generate(arguments, ranks)
            except RefusedError as refused:
                # Leaving the block waits for all ranks: torchrun stops those that have not spoken when one has left.
                if refused.speaks:
                    _report_error(refused, arguments)
                return 2
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        return _report_error(error, arguments)


def _report_error(error: Exception, arguments: GenerateArguments) -> int:
    if arguments.debug:
        traceback.print_exception(error)
    if is_lost_rank(error):
        _tell(
            f"a rank stopped or did not answer within {arguments.timeout_s:g} s; see the first error of the other ranks, "
            f"or give --timeout-s more ({str(error).splitlines()[0]})"
        )
        return 1
    _tell(str(error))
    return 2


def _tell(text: str) -> None:
    rank = rank_from_environment()
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _be_quiet(first: bool) -> None:
    """Leave progress, logs and warnings to rank 0."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if first:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("sp_sparse").setLevel(logging.INFO)  # which kernel `auto` chose
    else:
        warnings.simplefilter("ignore")
        os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
