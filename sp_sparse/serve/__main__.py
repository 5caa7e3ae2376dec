"""The command: from its arguments to its exit status."""

from __future__ import annotations

from collections.abc import Sequence

from sp_sparse.generate.__main__ import PACKAGES as GENERATE_PACKAGES
from sp_sparse.generate.console import be_quiet, refuse_arguments, require_packages
from sp_sparse.generate.ranks import leave, rank_from_environment
from sp_sparse.serve.arguments import parse_serve_arguments

PACKAGES = (*GENERATE_PACKAGES, "fastapi", "uvicorn", "pydantic", "python_multipart", "prometheus_client", "httpx")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM.

    Returns:
        0 when drained; 1 if a rank was lost or the server failed; 2 for an error of the user's.
    """
    try:
        arguments = parse_serve_arguments(argv)
        require_packages("serve", "diffusers,serve", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    be_quiet(rank_from_environment() == 0)
    from sp_sparse.serve.command import serve  # here, for it needs the packages, and some read the environment

    return serve(arguments)


if __name__ == "__main__":
    leave(main())
