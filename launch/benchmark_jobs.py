"""Whole jobs of `generate`, one JSON line each: the seconds and the peak memory of every stage.

    python launch/benchmark_jobs.py job --settings dense 0.7 0.5 0.3 quality --output jobs.jsonl -- \\
        --model a14b-random --layers 40 --full --compile
    torchrun --standalone --nproc-per-node 2 launch/benchmark_jobs.py memory --settings plain vae-tiling --memory-gb 48 \\
        --output memory.jsonl -- --model a14b-random --layers 40 --full --ulysses-degree 2 --height 720 --width 1280

Every job loads its weights anew, as a user's does. What follows `--` are flags of `generate` for all of them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from sp_sparse.generate.console import be_quiet, report_error  # noqa: E402
from sp_sparse.generate.ranks import USER_ERRORS, leave, rank_from_environment, start_ranks  # noqa: E402


def main() -> int:
    be_quiet(rank_from_environment() == 0)
    from launch.benchmarks.jobs import measure, parse_arguments  # here, for diffusers reads the environment at import

    arguments = parse_arguments(sys.argv[1:], __doc__)
    try:
        job = arguments.jobs()[0]
        with start_ranks(job.device, job.timeout_s) as ranks:
            status = measure(arguments, ranks)
            if status and ranks.world > 1:
                leave(status)  # the others may never come to the end of the block
            return status
    except USER_ERRORS as error:
        return report_error(error, 900.0, False)


if __name__ == "__main__":
    leave(main())
