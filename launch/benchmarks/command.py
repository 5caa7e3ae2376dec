"""The command: from its arguments to its exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from launch.benchmarks.arguments import (
    AttentionArguments,
    PlotArguments,
    QualityArguments,
    RunArguments,
    TimelineArguments,
    TransformerArguments,
    parse_arguments,
)
from sp_sparse.generate.console import be_quiet, refuse_arguments, run_on_ranks
from sp_sparse.generate.ranks import USER_ERRORS, Ranks, rank_from_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or draw what was measured.

    Returns:
        0; 1 if a measurement failed; 2 for an error of the user's.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["kernels"]:
            return _kernels(given[1:])
        if given[:1] == ["simulate"]:
            from launch.benchmarks.simulation.command import run

            return run(given[1:])
        arguments = parse_arguments(given)
        if isinstance(arguments, PlotArguments):
            return _plot(arguments)
        if isinstance(arguments, QualityArguments):
            return _quality(arguments)
    except USER_ERRORS as error:
        return refuse_arguments(error)
    return _run(arguments)


def _run(arguments: RunArguments) -> int:
    be_quiet(rank_from_environment() == 0)
    return run_on_ranks(lambda: partial(_measure, arguments), arguments.device, arguments.timeout_s)


@torch.no_grad()
def _measure(arguments: RunArguments, ranks: Ranks) -> int:
    from launch.benchmarks.session import Session

    ranks.check_same(arguments)
    ranks.together(lambda: arguments.check(ranks.world))
    session = ranks.together(lambda: Session(ranks, arguments.output, arguments.time_limit_s))
    try:
        if isinstance(arguments, AttentionArguments):
            from launch.benchmarks.attention import measure_attention

            measure_attention(session, arguments)
        elif isinstance(arguments, TimelineArguments):
            from launch.benchmarks.timeline import measure_timelines

            if ranks.device.type != "cuda":
                raise ValueError("a timeline is the GPUs', and none is visible here; run this on a machine with some")
            measure_timelines(session, arguments)
        elif isinstance(arguments, TransformerArguments):
            from launch.benchmarks.transformer import measure_transformer

            measure_transformer(session, arguments)
    except BaseException:
        session.finish()  # what there is
        raise
    return session.finish()


def _kernels(flags: list[str]) -> int:
    from launch.benchmarks import kernels

    if not torch.cuda.is_available() and not {"-h", "--help"} & set(flags):
        raise ValueError("kernels are measured on a GPU, and none is visible here; run this on a machine with one")
    kernels.main(flags)
    return 0


def _plot(arguments: PlotArguments) -> int:
    from launch.benchmarks.plot import draw
    from launch.benchmarks.scaling import report_scaling

    action = report_scaling if arguments.scaling else draw
    for path in action(arguments.results, arguments.output_dir):
        print(path)
    return 0


def _quality(arguments: QualityArguments) -> int:
    from launch.benchmarks.quality import write_quality

    for path in write_quality(arguments.fidelity, arguments.speed, arguments.document, arguments.output_dir):
        print(path)
    return 0
