"""The command: from its arguments to its exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sp_sparse.generate.__main__ import PACKAGES as GENERATE_PACKAGES
from sp_sparse.generate.console import be_quiet, refuse_arguments, require_packages, run_on_ranks
from sp_sparse.generate.ranks import Ranks, leave, rank_from_environment
from sp_sparse.serve.arguments import parse_serve_arguments
from sp_sparse.serve.stop import Stop

PACKAGES = (*GENERATE_PACKAGES, "fastapi", "uvicorn", "pydantic", "python_multipart", "prometheus_client", "httpx")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM.

    Returns:
        0 when drained; else as `run_on_ranks`.
    """
    try:
        arguments = parse_serve_arguments(argv)
        require_packages("serve", "diffusers,serve", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    be_quiet(rank_from_environment() == 0)
    stop = Stop(arguments.drain_s)

    def load() -> Callable[[Ranks], int]:
        from sp_sparse.serve.command import serve

        return partial(serve, arguments, stop)

    return run_on_ranks(load, arguments.device, arguments.timeout_s, arguments.debug, stop.ask)


if __name__ == "__main__":
    leave(main())
