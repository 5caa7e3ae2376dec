"""From the lines of single videos to figures of settings: means, paired differences, equal quality."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from sp_sparse.fidelity.plan import Baseline, Setting, labels
from sp_sparse.fidelity.statistics import Estimate, Values, density_for, estimate, paired
from sp_sparse.fidelity.store import DENSE, FLOOR

METRICS = ("psnr", "ssim", "lpips", "caption")


@dataclass(frozen=True)
class Row:
    """The videos of one setting, of dense attention, or of the noise floor.

    Attributes:
        label: in words.
        kind: DENSE, FLOOR or SPARSE.
        setting: None unless SPARSE.
        density, density_all: measured, the mean over videos; of the sparse calls and of all calls.
        seconds: of denoising, the median.
        means: by metric; None where it was not measured.
        gains: by metric, over the baseline's twin at the same prompts and seeds; None without one, or for the twin itself.
        values: by metric, of every video.
        videos: how many.
    """

    label: str
    kind: str
    setting: Setting | None
    density: float
    density_all: float
    seconds: float
    means: Mapping[str, Estimate | None]
    gains: Mapping[str, Estimate | None]
    values: Mapping[str, Values]
    videos: int

    def mean(self, metric: str) -> float:
        """NaN where it was not measured."""
        found = self.means[metric]
        return math.nan if found is None else found.mean


@dataclass(frozen=True)
class EqualQuality:
    """The density that a variant needs for a quality of its baseline.

    Attributes:
        variant: in words.
        of: its setting, without density.
        density, psnr: of the baseline's twin, as measured, over the prompts and seeds that it shares with the variant.
        needed: lowest and highest density between which the one lies that gives this PSNR: equal where it was interpolated,
            0 and the variant's lowest where that is better already, its highest and 1 where that is not good enough.
    """

    variant: str
    of: Setting
    density: float
    psnr: float
    needed: tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Everything that tables, plots and the page tell.

    Attributes:
        rows: dense, the noise floor, then the settings, those of a variant together by ascending density.
        baseline: what gains are over.
        prompts: how many were rendered.
    """

    rows: tuple[Row, ...]
    baseline: Baseline
    prompts: int

    @property
    def settings(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.setting is not None)

    def variants(self) -> dict[str, list[Row]]:
        """The rows of each variant by ascending density, by what the variant is called."""
        found: dict[Setting, list[Row]] = {}
        for row in self.settings:
            assert row.setting is not None
            found.setdefault(row.setting.variant, []).append(row)
        names = labels(list(found))
        return {names[variant]: rows for variant, rows in found.items()}

    def equal_quality(self) -> list[EqualQuality]:
        """What each variant needs for the mean PSNR of the baseline's twin, at each of its densities.

        Over the videos that all of them have: those of a run that was stopped are easier or harder than the others.
        """
        found = []
        by_setting = {row.setting: row for row in self.settings}
        for name, rows in self.variants().items():
            for row in rows:
                assert row.setting is not None
                twin = by_setting.get(self.baseline.twin(row.setting))
                if twin is None or twin is row or twin.density >= 1.0:
                    continue
                shared = set.intersection(*(set(one.values["psnr"]) for one in (twin, *rows)))
                if shared and math.isfinite(psnr := _mean(twin, shared)):
                    curve = [(one.density, _mean(one, shared)) for one in rows]
                    needed = density_for(psnr, curve)
                    found.append(EqualQuality(name, row.setting.variant, twin.density, psnr, needed))
        return found

    @property
    def baseline_told(self) -> str:
        """What gains are over, without the parts that all settings share."""
        settings = [row.setting for row in self.settings if row.setting is not None]
        return self.baseline.told(settings)


def summarize(lines: Sequence[Mapping[str, Any]], baseline: Baseline) -> Summary:
    """Of all videos that were measured, whatever run made them."""
    groups: dict[str | Setting, list[Mapping[str, Any]]] = {}
    for line in lines:
        key = line["kind"] if line["setting"] is None else Setting.from_json(line["setting"])
        groups.setdefault(key, []).append(line)
    settings = _in_order([key for key in groups if isinstance(key, Setting)])
    names: dict[str | Setting, str] = {DENSE: "dense", FLOOR: "dense by another kernel"}
    names |= dict(labels(settings).items())
    ordered: list[str | Setting] = [key for key in (DENSE, FLOOR) if key in groups]
    values = {key: {metric: _values(groups[key], metric) for metric in METRICS} for key in (*ordered, *settings)}
    rows = []
    for key in (*ordered, *settings):
        twin = baseline.twin(key) if isinstance(key, Setting) else key
        against = values.get(twin, {}) if twin != key else {}
        rows.append(
            Row(
                label=names[key],
                kind=groups[key][0]["kind"],
                setting=key if isinstance(key, Setting) else None,
                density=fmean(line["density"] for line in groups[key]),
                density_all=fmean(line["density_all"] for line in groups[key]),
                seconds=median(line["seconds"] for line in groups[key]),
                means={metric: estimate(found) for metric, found in values[key].items()},
                gains={metric: estimate(paired(values[key][metric], against.get(metric, {}))) for metric in METRICS},
                values=values[key],
                videos=len(groups[key]),
            )
        )
    return Summary(tuple(rows), baseline, len({line["prompt"] for line in lines}))


def _mean(row: Row, places: Collection[tuple[str, int]]) -> float:
    """PSNR over some videos."""
    return fmean(row.values["psnr"][place] for place in places)


def _in_order(settings: Sequence[Setting]) -> list[Setting]:
    """Variants as they were first measured, each by ascending density."""
    variants = list(dict.fromkeys(setting.variant for setting in settings))
    return sorted(settings, key=lambda setting: (variants.index(setting.variant), setting.density))


def _values(lines: Sequence[Mapping[str, Any]], metric: str) -> Values:
    """Of each prompt and seed; a PSNR that is none is that of equal videos, unless it is the reference's own."""
    found = {}
    for line in lines:
        value = line[metric]
        if value is None and metric == "psnr" and line["kind"] != DENSE:
            value = math.inf
        if value is not None:
            found[line["prompt"], line["seed"]] = float(value)
    return found
