"""What parts of a layer cost, fitted to raw results of `benchmark.py attention` and `timeline`; every number is physical."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from launch.benchmarks.results import Row, read_results
from launch.benchmarks.simulation.work import LayerSize

# The kernel whose tiles are modelled.
KERNEL = "fa4"


@dataclass(frozen=True)
class Link:
    """How GPUs send to one another, each both ways at once.

    Attributes:
        gb_per_s: of one GPU in one direction, in 10⁹ bytes.
        latency_us: of one exchange, its launch included.
        measured: whether that was measured here; else it is the nominal bandwidth.
    """

    name: str
    gb_per_s: float
    latency_us: float
    measured: bool

    def ms(self, nbytes: float, exchanges: int = 1) -> float:
        return exchanges * self.latency_us * 1e-3 + nbytes / self.gb_per_s * 1e-6


# Nominal, one direction: PCIe 5.0 x16 (32 GT/s, 128b/130b), and one NDR InfiniBand port a GPU (400 Gbit/s).
NOMINAL_GB_PER_S = {"pcie": 63.0, "infiniband": 50.0}


@dataclass(frozen=True)
class Costs:
    """Of one GPU of the kind that was measured.

    Attributes:
        tile_ns: a tile of the sparse kernel (a query block x a key block of one head), of the whole GPU's time.
        row_ns: beginning and ending one query block of one head in one kernel call, likewise.
        dense_tile_ns: a tile of the dense kernel.
        means_gb_per_s: reading queries or keys for their block means.
        pair_ns: scoring and ranking one pair of blocks of one head.
        memory_gb_per_s: packing, unpacking and merging, bytes read and written together.
        launch_us: from one kernel's end to the next one's beginning.
        exchange_share: of attention's speed, what an exchange under it takes while it lasts: multiprocessors and memory.
        multiprocessors: of a GPU; each attends one query block at a time.
        nvlink: the link between the GPUs that were measured.
    """

    tile_ns: float
    row_ns: float
    dense_tile_ns: float
    means_gb_per_s: float
    pair_ns: float
    memory_gb_per_s: float
    launch_us: float
    exchange_share: float
    nvlink: Link
    multiprocessors: int = 132

    def kernel_ms(self, tiles: float, rows: float) -> float:
        """One call of the sparse kernel over so many rows (query block x head), which come to an end in whole waves."""
        if rows <= 0:
            return 0.0
        waves = math.ceil(rows / self.multiprocessors) * self.multiprocessors / rows
        return (tiles * self.tile_ns + rows * self.row_ns) * waves * 1e-6 + self.launch_us * 1e-3

    def slowed_ms(self, ms: float, start: float, *exchanges: tuple[float, float]) -> float:
        """A kernel that takes `ms` alone and begins at `start`, with exchanges, each from one time to another."""
        together = sum(max(min(start + ms, end) - max(start, begin), 0.0) for begin, end in exchanges)
        return ms + self.exchange_share * together

    def selection_ms(self, size: LayerSize, rows: float, query_tokens: float, heads: float) -> float:
        """Block means of queries and keys, scores and top-k of `rows` (query block x head) over all key blocks."""
        read = 2 * size.token_bytes(query_tokens, heads)
        launches = 4 * self.launch_us * 1e-3
        return read / self.means_gb_per_s * 1e-6 + rows * size.blocks * self.pair_ns * 1e-6 + launches

    def copy_ms(self, nbytes: float, copies: int) -> float:
        """Reading and writing so many bytes."""
        return 2 * nbytes / self.memory_gb_per_s * 1e-6 + copies * self.launch_us * 1e-3

    def merge_ms(self, elements: float, first: bool, last: bool) -> float:
        """One more partial result: the sum so far is in float32, but the first result and what the last merge writes."""
        nbytes = elements * ((2 if first else 4) + 2 + (2 if last else 4))
        return nbytes / self.memory_gb_per_s * 1e-6 + self.launch_us * 1e-3

    def link(self, name: str) -> Link:
        """nvlink as measured; others with their nominal bandwidth and the latency of nvlink."""
        if name == self.nvlink.name:
            return self.nvlink
        return replace(self.nvlink, name=name, gb_per_s=NOMINAL_GB_PER_S[name], measured=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rows(folder: Path) -> list[Row]:
    """Every result of `attention` and `timeline` under a folder.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(path for path in folder.rglob("*.jsonl") if path.stem.startswith(("attention", "timeline")))
    if not paths:
        raise ValueError(
            f"{folder} holds no attention*.jsonl or timeline*.jsonl; give a folder of results such as launch/scaling.sh "
            "writes"
        )
    return read_results(paths)


def fit(rows: Sequence[Row]) -> Costs:
    """Costs from kernels timed alone and from timelines of two GPUs; no time of a whole layer on two GPUs goes in.

    Raises:
        ValueError: results that lack a part.
    """
    layers = [row for row in rows if row["what"] == "attention" and row["kernel"] == KERNEL and "ms_kernel" in row]
    dense = [row for row in rows if row["what"] == "attention" and row["kernel"] == "dense" and row["gpus"] == 1]
    lines = [row for row in rows if row["what"] == "timeline" and row["gpus"] == 2]
    if not layers or not dense or not lines:
        raise ValueError(
            f"{len(layers)} layers with {KERNEL} and their parts, {len(dense)} dense ones on one GPU, {len(lines)} "
            "timelines of two GPUs: some of each are needed; give results of launch/scaling.sh on two GPUs"
        )
    tile_ns, row_ns = _fit_kernel(layers)
    events = [_Events.of(row) for row in lines]
    ring = [e for e in events if e.ring == 2]
    gb_per_s, latency_us = _fit_link([pair for e in events for pair in e.exchanges])
    return Costs(
        tile_ns=tile_ns,
        row_ns=row_ns,
        dense_tile_ns=median(row["ms_median"] * 1e6 / (row["heads"] * size_of(row).blocks ** 2) for row in dense),
        means_gb_per_s=median(_rank_bytes(row) * 2 / row["ms_means"] * 1e-6 for row in layers),
        pair_ns=median((row["ms_scores"] + row["ms_topk"]) * 1e6 * row["gpus"] / _pairs(row) for row in layers),
        memory_gb_per_s=median(nbytes / ms * 1e-6 for e in ring for nbytes, ms in e.merges),
        launch_us=median(gap for e in ring for gap in e.gaps_us),
        exchange_share=median(share for e in ring for share in e.slowed),
        nvlink=Link("nvlink", gb_per_s, latency_us, measured=True),
    )


def size_of(row: Row) -> LayerSize:
    return LayerSize(row["sequence"], row["heads"], row["head_dim"])


def _pairs(row: Row) -> float:
    size = size_of(row)
    return float(size.heads * size.blocks**2)


def _rank_bytes(row: Row) -> float:
    """Of a query, key or value on one rank."""
    return size_of(row).token_bytes(row["sequence"], row["heads"]) / float(row["gpus"])


def _fit_kernel(rows: Iterable[Row]) -> tuple[float, float]:
    """Least squares of the relative error of the kernel alone over tiles and rows, without waves, which are whole there."""
    systems = []
    for row in rows:
        # A ring's rank attends its rows once a hop.
        visits = size_of(row).blocks * row["heads"] / row["gpus"] * row["ring"]
        systems.append((row["density"] * _pairs(row) / row["gpus"] / row["ms_kernel"], visits / row["ms_kernel"]))
    solved, *_ = np.linalg.lstsq(np.array(systems), np.full(len(systems), 1e6), rcond=None)
    return float(solved[0]), float(solved[1])


def _fit_link(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """GB/s and microseconds from (bytes, ms), by least squares of the relative error."""
    system = np.array([(1 / ms, nbytes / ms) for nbytes, ms in pairs])
    (latency, inverse), *_ = np.linalg.lstsq(system, np.ones(len(pairs)), rcond=None)
    return float(1e-6 / inverse), float(latency * 1e3)


@dataclass(frozen=True)
class _Events:
    """What a timeline of two GPUs tells: (bytes, ms) of exchanges and merges, gaps between kernels, and on a ring how much
    longer the first hop takes, under which keys and values travel, than the second, as a share of the exchanges."""

    ring: int
    exchanges: list[tuple[float, float]]
    merges: list[tuple[float, float]]
    gaps_us: list[float]
    slowed: list[float]

    @classmethod
    def of(cls, row: Row) -> _Events:
        by_rank: dict[int, list[list[Any]]] = {}
        for event in row["timeline"]:
            by_rank.setdefault(event[0], []).append(event)
        sent = [[e[5] - e[4] for e in events if "SendRecv" in e[3]] for events in by_rank.values()]
        half = _rank_bytes(row)
        # Ulysses sends three tensors of a quarter of the layer a chunk, then one back, each half of it to the other rank.
        sizes = [half] * 2 if row["ring"] == 2 else [half * 3 / 4, half * 3 / 4, half / 4, half / 4]
        # The rank that came first waited for the other.
        exchanges = [(nbytes, min(times)) for nbytes, *times in zip(sizes, *sent, strict=True)]
        merges = [
            (half / 2 * 6, event[5] - event[4])
            for events in by_rank.values()
            for event in events
            if event[2] == "merge"
        ]
        attended = next(iter(by_rank.values()))
        stream = next(event[1] for event in attended if event[2] == "selection")
        own = sorted((event for event in attended if event[1] == stream), key=lambda event: float(event[4]))
        gaps = [(after[4] - before[5]) * 1e3 for before, after in zip(own[:-1], own[1:], strict=True)]
        slowed = []
        for events, times in zip(by_rank.values(), sent, strict=True):
            hops = [event[5] - event[4] for event in events if event[2] == "attention"]
            slowed.append((hops[0] - hops[1]) / sum(times))
        return cls(row["ring"], exchanges, merges, gaps, slowed)
