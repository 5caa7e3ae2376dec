"""The command: from its arguments to its exit status."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sp_sparse.fidelity.arguments import parse_arguments
from sp_sparse.generate.__main__ import PACKAGES as GENERATE_PACKAGES
from sp_sparse.generate.console import be_quiet, refuse_arguments, report_error, require_packages, tell
from sp_sparse.generate.ranks import USER_ERRORS, leave, rank_from_environment, start_ranks
from sp_sparse.parallel.agreement import RefusedError

PACKAGES = (*GENERATE_PACKAGES, "torchmetrics", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        0; 1 if another rank stopped; 2 for an error of the user's; 130 if it was interrupted.
    """
    try:
        arguments = parse_arguments(argv)
        require_packages("fidelity", "fidelity", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    first = rank_from_environment() == 0
    be_quiet(first)
    logging.getLogger("sp_sparse").setLevel(
        logging.WARNING
    )  # the kernel stands in every line, and is chosen every time
    try:
        from sp_sparse.fidelity.job import measure  # here, for diffusers reads the environment when it is imported

        with start_ranks(arguments.device, arguments.timeout_s) as ranks:
            try:
                return measure(arguments, ranks)
            except RefusedError as refused:
                # Leaving the block waits for all ranks: torchrun stops those that have not spoken when one has left.
                if refused.speaks:
                    report_error(refused, arguments.timeout_s, arguments.debug)
                return 2
    except KeyboardInterrupt:
        if first:
            tell("interrupted; the same command goes on after the last video that was measured")
        return 130
    except USER_ERRORS as error:
        return report_error(error, arguments.timeout_s, arguments.debug)


if __name__ == "__main__":
    leave(main())
