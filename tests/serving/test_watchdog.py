"""The watchdog speaks when nothing moves, and only then."""

from __future__ import annotations

import threading

import pytest

from sp_sparse.serve import watchdog as watchdog_module
from sp_sparse.serve.watchdog import Watchdog, end_process
from tests.ranks import run_ranks


def test_it_speaks_when_a_bound_is_passed() -> None:
    told: list[str] = []
    spoke = threading.Event()

    def on_expiry(text: str) -> None:
        told.append(text)
        spoke.set()

    watchdog = Watchdog(on_expiry)
    with watchdog.limit(1000, "outer"), watchdog.limit(0.3, "a step"):
        assert spoke.wait(60)
    assert told == ["a step took more than 0.3 s; ending, so that the ranks can start anew"]


def test_it_is_silent_while_there_is_progress_and_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    looked = threading.Semaphore(0)

    def clock() -> float:
        looked.release()
        return now

    monkeypatch.setattr(watchdog_module, "monotonic", clock)
    told: list[str] = []
    watchdog = Watchdog(told.append)
    with watchdog.limit(10, "outer"):
        for _ in range(3):
            now += 9
            watchdog.beat()
        with watchdog.limit(100, "inner"):
            now += 90  # the outer bound rests
            _several_looks(looked)
        now += 9
        _several_looks(looked)
    now += 1000
    with watchdog.limit(10, "another"):
        _several_looks(looked)
    assert not told


def _several_looks(looked: threading.Semaphore) -> None:
    while looked.acquire(blocking=False):
        pass
    for _ in range(3):
        assert looked.acquire(timeout=60)


def _hang(rank: int) -> None:
    watchdog = Watchdog(end_process)
    with watchdog.limit(0.2, "nothing"):
        threading.Event().wait()


def test_it_ends_the_process() -> None:
    with pytest.raises(Exception, match="exit code 1"):
        run_ranks(1, _hang)
