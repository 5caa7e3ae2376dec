"""`benchmark simulate`: what a layer would take on more GPUs, from recorded masks and measured costs; needs no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.benchmarks.arguments import positive
from launch.benchmarks.results import read_results
from launch.benchmarks.simulation.check import check, check_table
from launch.benchmarks.simulation.costs import NOMINAL_GB_PER_S, Costs, fit, read_rows
from launch.benchmarks.simulation.replay import Cluster
from launch.benchmarks.simulation.scenarios import Scenario, simulate
from launch.benchmarks.simulation.tables import balance_table, draw_scaling, scaling_table
from launch.benchmarks.simulation.work import LayerSize
from sp_sparse.generate.files import whole_file
from sp_sparse.generate.recorded_masks import RecordedMasks

_RESULTS = Path(__file__).resolve().parents[3] / "docs/benchmarks"
_MASKS = tuple(_RESULTS / f"2026-11-26_cpu_simulate/mini_{density}.npz" for density in (0.3, 0.1))
_COSTS = _RESULTS / "2026-11-25_h200x2_scaling"

# Tokens of 81 frames.
_SIZES = {"480p": 32760, "720p": 75600}
_LINKS = ("nvlink", *NOMINAL_GB_PER_S)


@dataclass(frozen=True)
class SimulateArguments:
    """What is simulated.

    Attributes:
        masks: recordings, as `generate --output-masks` writes them.
        costs: folder of results that costs are fitted to.
        checks: further results that the model is compared with.
        node: GPUs of a node; between nodes the link is InfiniBand.
    """

    masks: tuple[Path, ...]
    costs: Path
    checks: tuple[Path, ...]
    sizes: tuple[str, ...]
    links: tuple[str, ...]
    gpus: tuple[int, ...]
    heads: int
    node: int
    output_dir: Path


def run(flags: Sequence[str]) -> int:
    """Write the tables, the picture and every number; returns the exit status.

    Raises:
        ValueError: flags or files that will not do.
    """
    arguments = _parse(flags)
    recordings = [RecordedMasks.load(path) for path in arguments.masks]
    rows = read_rows(arguments.costs)
    costs = fit(rows)
    own = check(rows, costs)
    checked = [*own, *check(read_results(arguments.checks), costs)]
    found = [
        one
        for name in arguments.sizes
        for masks in recordings
        for link in arguments.links
        for one in simulate(
            Scenario(LayerSize(_SIZES[name], arguments.heads), _cluster(costs, link, arguments.node), masks, costs),
            arguments.gpus,
        )
    ]
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    met = sum(one.met for one in checked)
    head = f"{met} of {len(checked)} rows within 7 %. Fitted: {_told(costs)}\n\n"
    written = {
        "check.md": head + check_table(checked),
        "scaling.md": scaling_table(found, own),
        "balance.md": balance_table(recordings, costs),
        "simulated.jsonl": "".join(json.dumps(one.to_json()) + "\n" for one in found),
    }
    for name, text in written.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(folder / name)
    for path in draw_scaling(found, own, folder):
        print(path)
    print(f"the model is within 7 % of {met} of {len(checked)} measured layers: {folder / 'check.md'}")
    return 0


def _parse(flags: Sequence[str]) -> SimulateArguments:
    parser = argparse.ArgumentParser(prog="benchmark.py simulate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--masks", nargs="+", type=Path, default=_MASKS, help="files of generate --output-masks")
    parser.add_argument("--costs", type=Path, default=_COSTS, help="folder of raw results of two GPUs")
    parser.add_argument("--checks", nargs="+", type=Path, default=(), help="further raw results to compare with")
    parser.add_argument("--sizes", nargs="+", choices=tuple(_SIZES), default=tuple(_SIZES))
    parser.add_argument("--links", nargs="+", choices=_LINKS, default=_LINKS, help="within a node")
    parser.add_argument("--gpus", nargs="+", type=positive, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--heads", type=positive, default=40)
    parser.add_argument("--node", type=positive, default=8, help="GPUs of a node")
    parser.add_argument("--output-dir", type=Path, required=True)
    given = vars(parser.parse_args(list(flags)))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return SimulateArguments(**values)


def _cluster(costs: Costs, link: str, node: int) -> Cluster:
    # A node of one GPU: everything goes over the link between nodes.
    across = costs.link("infiniband")
    return Cluster(costs.link(link), across, 1 if link == "infiniband" else node)


def _told(costs: Costs) -> str:
    values = asdict(costs)
    link = values.pop("nvlink")
    told = [f"{name} {value:.4g}" for name, value in values.items()]
    return ", ".join([*told, f"nvlink {link['gb_per_s']:.4g} GB/s and {link['latency_us']:.3g} µs an exchange"]) + "."
