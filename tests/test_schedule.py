"""Schedules: (layer, step, steps) -> density, by tables worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_sparse import Schedule
from sp_sparse.schedule import SCHEDULES


def _steps(schedule: Schedule, layer: int, num_steps: int) -> list[float]:
    return [schedule.density(layer, step, num_steps) for step in range(num_steps)]


def test_constant() -> None:
    schedule = Schedule(0.3, "constant")
    assert not schedule.needs_step
    assert schedule.density(0, None, None) == schedule.density(39, 7, 50) == 0.3


def test_conservative() -> None:
    schedule = Schedule(0.3)
    assert schedule.needs_step
    assert _steps(schedule, 0, 4) == [1.0] * 4
    assert _steps(schedule, 1, 4) == [1.0, 0.3, 0.3, 0.3]
    assert _steps(schedule, 1, 5) == [1.0, 1.0, 0.3, 0.3, 0.3], "a quarter is rounded up"
    assert _steps(schedule, 9, 1) == [1.0]
    assert schedule.density(0, None, None) == 1.0


def test_aggressive() -> None:
    schedule = Schedule(0.4, "aggressive")
    assert _steps(schedule, 0, 5) == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2])
    assert _steps(schedule, 3, 1) == [0.4]


def test_table() -> None:
    schedule = Schedule(0.3, "table", ((1.0, 0.5), (0.25,), (0.75, 0.5, 0.25)))
    assert _steps(schedule, 0, 4) == [1.0, 1.0, 0.5, 0.5]
    assert _steps(schedule, 0, 5) == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert _steps(schedule, 1, 3) == [0.25] * 3
    assert _steps(schedule, 2, 6) == _steps(schedule, 39, 6) == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert _steps(schedule, 2, 2) == [0.75, 0.5], "fewer steps than entries"


def test_table_of_one_column_needs_no_step() -> None:
    schedule = Schedule(0.3, "table", ((1.0,), (0.5,)))
    assert not schedule.needs_step
    assert [schedule.density(layer, None, None) for layer in range(3)] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_dense_steps_and_layers(kind: str) -> None:
    table = ((0.2, 0.2),) if kind == "table" else ()
    schedule = Schedule(0.2, kind, table, dense_steps=9, dense_layers=2)
    assert schedule.needs_step
    assert schedule.density(0, None, None) == schedule.density(1, None, None) == 1.0
    assert [d == 1.0 for d in _steps(schedule, 2, 12)] == [True] * 9 + [False] * 3


@given(
    kind=st.sampled_from(["constant", "conservative", "aggressive"]),
    topk=st.floats(0.01, 1.0),
    layer=st.integers(0, 50),
    num_steps=st.integers(1, 60),
    dense=st.integers(0, 5),
)
def test_densities_are_shares_that_never_rise(kind: str, topk: float, layer: int, num_steps: int, dense: int) -> None:
    densities = _steps(Schedule(topk, kind, dense_steps=dense), layer, num_steps)
    assert all(0 < density <= 1.0 for density in densities)
    assert densities == sorted(densities, reverse=True)


@pytest.mark.parametrize(
    "schedule",
    [Schedule(0.3), Schedule(0.3, "aggressive"), Schedule(0.3, "constant", dense_steps=1)],
    ids=lambda s: s.kind,
)
@pytest.mark.parametrize(("step", "num_steps"), [(None, None), (None, 4), (2, None)])
def test_unknown_step(schedule: Schedule, step: int | None, num_steps: int | None) -> None:
    with pytest.raises(ValueError, match=r"needs the denoising step.*pass step and num_steps"):
        schedule.density(1, step, num_steps)


@pytest.mark.parametrize("step", [-1, 4, 5])
def test_step_outside(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is outside \[0, 4\)"):
        Schedule(0.3).density(1, step, 4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"topk": 0.0}, r"topk 0.0 is outside \(0, 1\]"),
        ({"topk": -0.1}, "outside"),
        ({"topk": 1.01}, "topk 1.01 is outside"),
        ({"topk": float("nan")}, "outside"),
        ({"topk": 0.3, "kind": "sometimes"}, "unknown schedule 'sometimes'; use one of constant, conservative"),
        ({"topk": 0.3, "kind": "table"}, "'table' with a table of 0 rows"),
        ({"topk": 0.3, "kind": "constant", "table": ((0.5,),)}, "'constant' with a table of 1 rows"),
        ({"topk": 0.3, "kind": "table", "table": ((0.5,), ())}, "non-empty rows"),
        ({"topk": 0.3, "kind": "table", "table": ((0.5, 1.5),)}, "1.5 is outside"),
        ({"topk": 0.3, "kind": "table", "table": ((0.5,), (0.0,))}, "0.0 is outside"),
        ({"topk": 0.3, "dense_steps": -1}, "dense_steps=-1, dense_layers=0; use 0 or more"),
        ({"topk": 0.3, "dense_layers": -2}, "dense_layers=-2"),
    ],
)
def test_errors(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Schedule(**arguments)
