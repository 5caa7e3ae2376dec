"""The command: from its arguments to its exit status."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from sp_sparse.fidelity.arguments import parse_arguments
from sp_sparse.generate.__main__ import PACKAGES as GENERATE_PACKAGES
from sp_sparse.generate.console import INTERRUPTED, be_quiet, refuse_arguments, require_packages, run_on_ranks, tell
from sp_sparse.generate.ranks import Ranks, leave, rank_from_environment

PACKAGES = (*GENERATE_PACKAGES, "torchmetrics", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        As `run_on_ranks`.
    """
    try:
        arguments = parse_arguments(argv)
        require_packages("fidelity", "fidelity", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    first = rank_from_environment() == 0
    be_quiet(first)
    # The kernel stands in every line, and is chosen every time.
    logging.getLogger("sp_sparse").setLevel(logging.WARNING)

    def load() -> Callable[[Ranks], int]:
        from sp_sparse.fidelity.job import measure

        return partial(measure, arguments)

    status = run_on_ranks(load, arguments.device, arguments.timeout_s, arguments.debug)
    if status == INTERRUPTED and first:
        tell("interrupted; the same command goes on after the last video that was measured")
    return status


if __name__ == "__main__":
    leave(main())
