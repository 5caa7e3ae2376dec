"""A command on its ranks: what each way to end gives as exit status, and what the user reads of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO

import pytest

from sp_sparse.generate.console import INTERRUPTED, run_on_ranks
from sp_sparse.generate.ranks import Ranks
from sp_sparse.parallel.agreement import LostRankError, RefusedError
from tests.ranks import run_ranks


def _raising(error: BaseException) -> Callable[[Ranks], int]:
    def job(ranks: Ranks) -> int:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("too\n many"), 2, "error: too many\n"),
        (ImportError("no module"), 2, "error: no module\n"),
        (RefusedError("refused", speaks=True, failure=""), 2, "error: refused\n"),
        (RefusedError("refused", speaks=False, failure=""), 2, ""),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ],
)
def test_what_ends_a_job_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, told: str
) -> None:
    assert run_on_ranks(lambda: _raising(error), "cpu", 60.0) == status
    assert capsys.readouterr().err == told


def test_a_lost_rank_is_told_with_the_time_that_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on_ranks(lambda: _raising(LostRankError("gone\nfrom line 1")), "cpu", 60.0) == 1
    told = "error: a rank stopped or did not answer within 60 s; see the first error of the other ranks"
    assert capsys.readouterr().err == f"{told}, or give --timeout-s more (gone)\n"


def test_a_fault_of_ours_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on_ranks(lambda: _raising(ZeroDivisionError("ours")), "cpu", 60.0) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("ZeroDivisionError: ours\n")


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_on_ranks(lambda: _raising(ValueError("here")), "cpu", 60.0, debug=True) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("ValueError: here\nerror: here\n")


def test_the_status_is_the_jobs() -> None:
    assert run_on_ranks(lambda: lambda ranks: 10 * ranks.world + ranks.rank + 3, "cpu", 60.0) == 13


def _check_load(rank: int) -> None:
    def load() -> Callable[[Ranks], int]:
        if rank == 1:
            raise ImportError("no module")
        return lambda ranks: pytest.fail("a job without its other ranks")

    with redirect_stderr(StringIO()) as told:
        assert run_on_ranks(load, "cpu", 60.0) == 2
    told_by_rank = {0: "error: rank 1: no module\n", 1: "rank 1: error: no module\n", 2: ""}
    assert told.getvalue() == told_by_rank[rank]


def test_what_one_rank_cannot_import_ends_all_of_them() -> None:
    run_ranks(3, _check_load)


@pytest.mark.parametrize("module", ["generate.job", "fidelity.job", "serve.command"])
def test_a_command_that_cannot_be_imported_says_so_in_one_line(module: str) -> None:
    command = module.partition(".")[0]
    code = (
        f"import runpy, sys; sys.modules['sp_sparse.{module}'] = None; "
        f"runpy.run_module('sp_sparse.{command}', run_name='__main__')"
    )
    flags = ["--prompts", "prompts.txt", "--output", "out"] if command == "fidelity" else []
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: import of sp_sparse.{module} halted; None in sys.modules\n"
