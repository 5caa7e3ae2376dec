"""What is made of single figures: intervals, paired differences, equal quality, metrics, settings and their baseline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sp_sparse.fidelity.metrics import VideoMetrics, as_bytes, as_float
from sp_sparse.fidelity.plan import Setting, SettingLists, labels
from sp_sparse.fidelity.plots import quality_figure
from sp_sparse.fidelity.statistics import Estimate, density_for, estimate, paired
from sp_sparse.fidelity.summary import summarize
from sp_sparse.fidelity.tables import equal_quality_table, quality_table, told

LISTS = SettingLists(
    selector=("topk",),
    remainder=("drop", "linear"),
    order=("raster",),
    dense_steps=(0,),
    block_size=((16, 16),),
    keep_diagonal=(True,),
    keep_first_frame=(False,),
    density=(0.1, 0.3),
)


def test_two_prompts_by_hand() -> None:
    # Of 2 prompts drawn twice: both the first with 1/4, both the second with 1/4, each once with 1/2. 2.5 % lies within the
    # first of these, 97.5 % within the second, so the ends are the prompts' own means.
    values = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 5.0}
    assert estimate(values) == Estimate(mean=8 / 3, low=1.5, high=5.0, count=3)


def test_the_interval_of_many_prompts_is_that_of_their_mean() -> None:
    draws = np.random.default_rng(1).normal(2.0, 1.0, 400)
    found = estimate({(str(i), 0): float(x) for i, x in enumerate(draws)})
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * draws.std() / 20
    assert found.low == pytest.approx(draws.mean() - half, abs=0.01)
    assert found.high == pytest.approx(draws.mean() + half, abs=0.01)
    assert found.excludes_zero


def test_seeds_of_a_prompt_are_drawn_together() -> None:
    # Ten seeds that are all alike say no more than one of them.
    wide = estimate({(prompt, seed): value for prompt, value in (("a", 0.0), ("b", 1.0)) for seed in range(10)})
    assert wide == Estimate(0.5, 0.0, 1.0, 20)


def test_without_an_interval() -> None:
    assert estimate({}) is None
    assert estimate({("a", 0): 3.0, ("a", 1): 4.0}) == Estimate(3.5, None, None, 2)
    assert estimate({("a", 0): math.inf, ("b", 0): 4.0}) == Estimate(math.inf, None, None, 2)


def test_only_the_same_prompt_and_seed_are_paired() -> None:
    values = {("a", 0): 5.0, ("a", 1): 7.0, ("b", 0): math.inf, ("c", 0): 1.0}
    baseline = {("a", 0): 4.0, ("b", 0): 3.0, ("d", 0): 9.0}
    assert paired(values, baseline) == {("a", 0): 1.0}


@pytest.mark.parametrize(
    ("quality", "curve", "expected"),
    [
        (22.0, [(0.1, 20.0), (0.3, 24.0)], (0.2, 0.2)),
        (24.0, [(0.3, 24.0), (0.1, 20.0)], (0.3, 0.3)),
        (20.0, [(0.1, 20.0), (0.3, 24.0)], (0.1, 0.1)),
        (19.0, [(0.1, 20.0), (0.3, 24.0)], (0.0, 0.1)),
        (25.0, [(0.1, 20.0), (0.3, 24.0)], (0.3, 1.0)),
        (21.0, [(0.1, 22.0), (0.2, 20.0), (0.3, 22.0)], (0.25, 0.25)),
        (22.0, [(0.1, 20.0), (0.2, 24.0), (0.3, 20.0), (0.4, 24.0)], (0.35, 0.35)),
        (22.0, [(0.1, 20.0), (0.2, 22.0), (0.3, 22.0), (0.4, 24.0)], (0.2, 0.2)),
        (21.0, [(0.1, 20.0), (1.0, math.inf)], (1.0, 1.0)),
        (math.inf, [(0.1, 20.0), (1.0, math.inf)], (1.0, 1.0)),
    ],
)
def test_density_for_a_quality(quality: float, curve: list[tuple[float, float]], expected: tuple[float, float]) -> None:
    assert density_for(quality, curve) == pytest.approx(expected)


def _video(seed: int, frames: int = 9) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)


def test_psnr_by_hand_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _video(0), _video(1)
    metrics = VideoMetrics(torch.device("cpu"), 24)
    whole = metrics.compare(one, other)
    error = np.square((one.astype(float) - other.astype(float)) / 255).mean()
    assert whole["psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-4)
    monkeypatch.setattr("sp_sparse.fidelity.metrics._BUDGET", 4 * one[0].size)
    assert metrics.compare(one, other) == pytest.approx(whole, abs=1e-6)
    assert metrics.compare(one, one)["psnr"] is None, "it remembers the videos before"


def test_equal_videos() -> None:
    found = VideoMetrics(torch.device("cpu"), 24).compare(_video(0), _video(0))
    assert (found["psnr"], found["ssim"]) == (None, pytest.approx(1.0))


def test_bytes_are_rounded() -> None:
    frames = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2, -0.1]).reshape(1, 1, 2, 3)
    assert as_bytes(frames).ravel().tolist() == [0, 0, 1, 255, 255, 0]
    assert torch.equal(as_float(as_bytes(frames)).ravel()[3:4], torch.ones(1))


def test_settings_are_the_product_and_survive_json() -> None:
    settings = LISTS.settings()
    assert [(s.remainder, s.density) for s in settings] == [
        ("drop", 0.1), ("drop", 0.3), ("linear", 0.1), ("linear", 0.3)
    ]  # fmt: skip
    assert replace(LISTS, density=(0.1, 0.3, 0.1)).settings() == settings, "a value that is given twice is made once"
    assert [Setting.from_json(s.to_json()) for s in settings] == list(settings)
    assert list(labels(settings).values())[1] == "topk, drop, d=0.3"


def test_each_setting_has_its_twin() -> None:
    settings = LISTS.settings()
    assert [LISTS.baseline(None).twin(s) for s in settings] == [settings[0], settings[1]] * 2
    assert [LISTS.baseline("density=0.3").twin(s) for s in settings] == [settings[1]] * 2 + [settings[3]] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour=red", "'colour' is not known; name some of selector, remainder"),
        ("remainder=mean", "remainder 'mean' is not measured; use one of drop, linear"),
        ("block_size=128", "block_size '128' is not measured; use one of 16x16"),
    ],
)
def test_a_baseline_that_is_not_there(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LISTS.baseline(text)


def _lines() -> list[dict[str, Any]]:
    """Drop: PSNR 20 and 24 at densities 0.1 and 0.3; linear 2 dB better; the second prompt 1 dB above the first."""
    lines = []
    for setting in LISTS.settings():
        for prompt, shift in (("a", 0.0), ("b", 1.0)):
            psnr = (
                20.0
                + shift
                + (4.0 if setting.density == 0.3 else 0.0)
                + (2.0 if setting.remainder == "linear" else 0.0)
            )
            measured = {"psnr": psnr, "ssim": 0.9, "lpips": None, "caption": None}
            times = {"density": setting.density, "density_all": setting.density, "seconds": 1.0}
            lines.append(
                {"kind": "sparse", "prompt": prompt, "seed": 0, "setting": setting.to_json(), **measured, **times}
            )
    return lines


def test_summary_by_hand() -> None:
    summary = summarize(_lines(), LISTS.baseline(None))
    drop, _, linear, _ = summary.rows
    assert drop.means["psnr"] == Estimate(20.5, 20.0, 21.0, 2)
    assert drop.gains["psnr"] is None
    assert linear.gains["psnr"] == Estimate(2.0, 2.0, 2.0, 2)
    equal = summary.equal_quality()
    # 20.5 dB is below what linear has at 0.1; it has 24.5 dB half-way from 22.5 to 26.5.
    assert [e.needed for e in equal] == [(0.0, 0.1), pytest.approx((0.2, 0.2))]
    table = equal_quality_table(summary)
    assert table.rows == (
        ("topk, linear", "0.100", "20.50", "below 0.100"),
        ("topk, linear", "0.300", "24.50", "0.200"),
    )
    assert "LPIPS" not in quality_table(summary).header
    assert (
        "| topk, linear, d=0.1 | 0.100 | 0.100 | 22.50 [22.00, 23.00] | +2.00* [+2.00, +2.00] |"
        in quality_table(summary).markdown()
    )


def test_equal_quality_is_over_the_videos_that_both_have() -> None:
    """As after a run that was stopped: the easier of two prompts alone says nothing against both."""
    for easier, full, psnr in (("b", "drop", 21.0), ("a", "linear", 20.0)):
        lines = [x for x in _lines() if x["prompt"] == easier or x["setting"]["remainder"] == full]
        equal = summarize(lines, LISTS.baseline(None)).equal_quality()
        assert [(e.psnr, e.needed) for e in equal] == [(psnr, (0.0, 0.1)), (psnr + 4, pytest.approx((0.2, 0.2)))]


def test_equal_quality_is_at_measured_densities() -> None:
    """Masks keep whole blocks, and what is always kept: 0.1 was asked for, and 0.15 was measured."""
    lines = [{**line, "density": line["density"] + 0.05} for line in _lines()]
    _, second = summarize(lines, LISTS.baseline(None)).equal_quality()
    assert (second.density, second.needed) == (pytest.approx(0.35), pytest.approx((0.25, 0.25)))


def test_what_equal_quality_says_of_a_variant_that_is_worse() -> None:
    table = equal_quality_table(summarize(_lines(), LISTS.baseline("remainder=linear")))
    assert [row[3] for row in table.rows] == ["0.200", "above 0.300"]


def test_dense_attention_as_a_setting_needs_no_equal() -> None:
    lines = [{**x, "density": 1.0, "psnr": 90.0} if x["density"] == 0.3 else x for x in _lines()]
    assert [e.density for e in summarize(lines, LISTS.baseline(None)).equal_quality()] == [0.1]


def test_videos_without_a_difference() -> None:
    """A PSNR that is none is infinite: the floor is equal to the reference here. The reference itself has none."""
    line = {**_lines()[0], "setting": None, "density": 1.0, "psnr": None}
    summary = summarize([{**line, "kind": "dense"}, {**line, "kind": "floor"}, *_lines()], LISTS.baseline(None))
    dense, floor, *_ = summary.rows
    assert dense.means["psnr"] is None
    assert floor.means["psnr"] == Estimate(math.inf, None, None, 1)
    psnr = quality_table(summary).header.index("PSNR dB")
    assert [row[psnr] for row in quality_table(summary).rows[:2]] == ["–", "∞"]


def test_one_slow_video_is_not_what_a_setting_takes() -> None:
    slow = [
        {**line, "prompt": str(number), "seconds": 1.0 if number else 100.0} for number, line in enumerate(_lines())
    ]
    same = [{**line, "setting": slow[0]["setting"]} for line in slow]
    assert summarize(same, LISTS.baseline(None)).rows[0].seconds == 1.0


@pytest.mark.parametrize(("prompts", "few"), [(19, True), (20, False)])
def test_intervals_over_few_prompts_are_told(prompts: int, few: bool) -> None:
    lines = [{**_lines()[0], "prompt": str(number)} for number in range(prompts)]
    assert ("too narrow with so few" in quality_table(summarize(lines, LISTS.baseline(None))).note) is few


@pytest.mark.parametrize("floor", [28.0, 100.0, None])
def test_a_plot_shows_all_of_its_curves(floor: float | None) -> None:
    line = {**_lines()[0], "kind": "floor", "setting": None, "density": 1.0, "psnr": floor}
    axes = quality_figure(summarize([line, *_lines()], LISTS.baseline(None)), "psnr").axes[0]
    curves = [curve for curve in axes.get_lines() if str(curve.get_label()).startswith("topk")]
    assert [np.asarray(curve.get_ydata()).tolist() for curve in curves] == [[20.5, 24.5], [22.5, 26.5]]
    low, high = axes.get_ylim()
    assert 18 < low < 20.5
    assert 26.5 < high < 29
    assert any(str(curve.get_label()).startswith("noise floor") for curve in axes.get_lines())


def test_figures_in_words() -> None:
    assert told(None, 2) == "–"
    assert told(Estimate(math.inf, None, None, 2), 2) == "∞"
    assert told(Estimate(-0.0001, -0.1, 0.1, 2), 2, signed=True) == "+0.00 [-0.10, +0.10]"
    assert told(Estimate(-1.0, -1.5, -0.5, 2), 2, signed=True) == "-1.00* [-1.50, -0.50]"
