"""The command: from its arguments to its exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.console import be_quiet, refuse_arguments, require_packages, run_on_ranks
from sp_sparse.generate.ranks import Ranks, leave, rank_from_environment

PACKAGES = ("diffusers", "transformers", "accelerate", "ftfy", "imageio", "imageio_ffmpeg", "tqdm", "PIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate videos.

    Returns:
        0; 1 if `--verify` failed; else as `run_on_ranks`.
    """
    try:
        arguments = parse_arguments(argv)
        require_packages("generate", "diffusers", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    be_quiet(rank_from_environment() == 0)

    def load() -> Callable[[Ranks], int]:
        from sp_sparse.generate.job import generate

        return partial(generate, arguments)

    return run_on_ranks(load, arguments.device, arguments.timeout_s, arguments.debug)


if __name__ == "__main__":
    leave(main())
