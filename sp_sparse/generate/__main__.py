"""The command: from its arguments to its exit status."""

from __future__ import annotations

from collections.abc import Sequence

from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.console import be_quiet, refuse_arguments, report_error, require_packages
from sp_sparse.generate.ranks import USER_ERRORS, leave, rank_from_environment, start_ranks
from sp_sparse.parallel.agreement import RefusedError

PACKAGES = ("diffusers", "transformers", "accelerate", "ftfy", "imageio", "imageio_ffmpeg", "tqdm", "PIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate videos.

    Returns:
        0; 1 if `--verify` failed or another rank stopped; 2 for an error of the user's.
    """
    try:
        arguments = parse_arguments(argv)
        require_packages("generate", "diffusers", PACKAGES)
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    be_quiet(rank_from_environment() == 0)
    try:
        from sp_sparse.generate.job import generate  # here, for diffusers reads the environment when it is imported

        with start_ranks(arguments.device, arguments.timeout_s) as ranks:
            try:
                return generate(arguments, ranks)
            except RefusedError as refused:
                # Leaving the block waits for all ranks: torchrun stops those that have not spoken when one has left.
                if refused.speaks:
                    report_error(refused, arguments.timeout_s, arguments.debug)
                return 2
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        return report_error(error, arguments.timeout_s, arguments.debug)


if __name__ == "__main__":
    leave(main())
