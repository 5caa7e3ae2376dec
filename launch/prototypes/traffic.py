"""What keys and values cost on a ring: passed on as the library does it, all-gathered, or pruned to what masks choose.

    NCCL_P2P_DISABLE=1 torchrun --standalone --nproc-per-node 2 -m launch.prototypes.traffic --output traffic.jsonl

For every size and mask, a JSON line an exchange: the share of the others' key blocks that ranks need, the bytes that the
busiest rank sends, and the median milliseconds of attention on keys that are there, of the exchange alone, and of both
together, as the library overlaps them. Pruned keys need their numbers on the host: in every call it waits for the device,
with the mask and the others' lists (ms_lists), and is no longer ahead after that. Selection is left out: it is the same for
all. Each output is compared with that of one device. Without a GPU it runs over gloo: take small shapes, --dtype float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.benchmarks.arguments import positive
from launch.benchmarks.inputs import random_inputs
from launch.benchmarks.results import environment
from launch.benchmarks.timing import Timer
from launch.prototypes.pruned_keys import Aside, Lists, PrunedKVStrategy
from sp_sparse import SequenceParallelMesh
from sp_sparse.generate.console import run_on_ranks
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.recorded_masks import RecordedMasks
from sp_sparse.kernels.registry import KernelRequest, select_kernel
from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.parallel.all_gather_kv import AllGatherKVStrategy
from sp_sparse.parallel.merge import PartialResults
from sp_sparse.parallel.shards import SequenceShards
from sp_sparse.parallel.strategy import Attend, Part, SequenceParallelStrategy

EXCHANGES = ("ring", "all_gather", "pruned")
SHAPES = ("random", "band")

_RECORDED = Path(__file__).resolve().parents[2] / "docs/benchmarks/2026-11-26_cpu_simulate"
# Of the root mean square; rounding of half precision, in another order of summing.
_MOST_ERROR = 0.02


@dataclass(frozen=True)
class TrafficArguments:
    """What is measured, on every rank alike; the fields are the flags of the same names."""

    tokens: tuple[int, ...]
    heads: int
    head_dim: int
    block: int
    masks: tuple[str, ...]
    densities: tuple[float, ...]
    exchanges: tuple[str, ...]
    backend: str
    dtype: str
    device: str
    warmup: int
    repeat: int
    output: Path | None
    timeout_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status, 1 if an output is wrong."""
    arguments = _parse(argv)
    return run_on_ranks(lambda: partial(_measure, arguments), arguments.device, arguments.timeout_s)


def _parse(argv: Sequence[str] | None) -> TrafficArguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=positive, default=(32760, 75600), help="of 480p and 720p")
    parser.add_argument("--heads", type=positive, default=40)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--block", type=positive, default=128)
    parser.add_argument(
        "--masks", nargs="+", default=(*SHAPES, *(str(_RECORDED / f"mini_{d}.npz") for d in (0.3, 0.1))),
        help=f"{', '.join(SHAPES)}, or files of generate --output-masks, which have densities of their own",
    )  # fmt: skip
    parser.add_argument("--densities", nargs="+", type=float, default=(0.3, 0.1), help=f"of {' and '.join(SHAPES)}")
    parser.add_argument("--exchanges", nargs="+", choices=EXCHANGES, default=EXCHANGES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeat", type=positive, default=10)
    parser.add_argument("--output", type=Path, help="JSON lines are appended here, too")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return TrafficArguments(**values)


@torch.no_grad()
def _measure(arguments: TrafficArguments, ranks: Ranks) -> int:
    ranks.check_same(arguments)
    if ranks.world < 2:
        raise ValueError("1 rank sends nothing; start 2 or more with torchrun --nproc-per-node")
    mesh = SequenceParallelMesh(1, ranks.world)
    aside = Aside(ranks.device)
    wrong = False
    for tokens in arguments.tokens:
        for name, dense in masks(arguments, tokens, ranks):
            case = Case(arguments, mesh, ranks, name, dense, tokens)
            for exchange in arguments.exchanges:
                row = case.measure(exchange, aside)
                wrong |= not row["error"] <= _MOST_ERROR
                if ranks.first:
                    line = json.dumps({**row, **environment(ranks.device)})
                    print(line, flush=True)
                    if arguments.output is not None:
                        with arguments.output.open("a", encoding="utf-8") as file:
                            file.write(line + "\n")
    return int(wrong)


def masks(arguments: TrafficArguments, tokens: int, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Name, and bool `[1, H, N, N]` over blocks, the same on all ranks."""
    blocks = num_blocks(tokens, arguments.block)
    for name in arguments.masks:
        if name not in SHAPES:
            recorded = RecordedMasks.load(Path(name))
            yield (
                Path(name).stem,
                stretched(median_place(recorded, ranks.world), blocks, arguments.heads).to(ranks.device),
            )
            continue
        for density in arguments.densities:
            kept = max(1, round(density * blocks))
            make = random_mask if name == "random" else band_mask
            yield name, make(arguments.heads, blocks, kept).to(ranks.device)


def random_mask(heads: int, blocks: int, kept: int) -> Tensor:
    """As many key blocks of every row, anywhere."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, heads, blocks, blocks, generator=generator).argsort(-1) < kept


def band_mask(heads: int, blocks: int, kept: int) -> Tensor:
    """As many key blocks of every row, those around its own place."""
    first = (torch.arange(blocks) - kept // 2).clamp_(0, blocks - kept).unsqueeze(1)
    columns = torch.arange(blocks)
    return ((columns >= first) & (columns < first + kept)).expand(1, heads, blocks, blocks)


def stretched(mask: np.ndarray[Any, np.dtype[np.bool_]], blocks: int, heads: int) -> Tensor:
    """A recorded mask `[H, Nq, Nk]` over so many blocks; heads are repeated."""
    rows, columns = (torch.arange(blocks) * side // blocks for side in mask.shape[1:])
    return torch.from_numpy(mask)[torch.arange(heads) % mask.shape[0]][:, rows][..., columns].unsqueeze(0)


def median_place(recorded: RecordedMasks, ranks: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The recorded mask of which ring shards need the median of key blocks."""
    every = [recorded.dense(number) for number in range(len(recorded.places))]
    order = sorted(range(len(every)), key=lambda n: needed_share(torch.from_numpy(every[n]).unsqueeze(0), ranks))
    return every[order[len(order) // 2]]


def needed_share(dense: Tensor, ranks: int) -> float:
    """Of the key blocks of other ranks, for each head: those that any query block of a rank's shard attends; the mean.

    `dense`: bool `[B, H, N, N]` over blocks.
    """
    cut = SequenceShards.aligned(dense.shape[-1], 1, 1, ranks)
    return float(_needed(dense, cut).sum() / sum(dense.shape[1] * (dense.shape[-1] - held) for held in cut.lengths))


def _needed(dense: Tensor, cut: SequenceShards) -> Tensor:
    """Blocks x heads that each rank needs of each other one, `[R, R]` with 0 on the diagonal; `cut` is over blocks."""
    shards = [slice(*cut.range_of(rank)) for rank in range(len(cut.lengths))]
    found = torch.tensor([[int(dense[..., rows, columns].any(2).sum()) for columns in shards] for rows in shards])
    return found.fill_diagonal_(0)


class Case:
    """One size and mask, on this rank: its shard of random tensors, and the rows of the mask."""

    def __init__(
        self,
        arguments: TrafficArguments,
        mesh: SequenceParallelMesh,
        ranks: Ranks,
        name: str,
        dense: Tensor,
        tokens: int,
    ) -> None:
        """`dense`: `[1, H, N, N]`, over blocks."""
        self._arguments, self._mesh, self._ranks, self._name, self._dense = arguments, mesh, ranks, name, dense
        self.shards = SequenceShards.aligned(tokens, arguments.block, 1, ranks.world)
        size = arguments.block, arguments.block
        first, last = self.shards.range_of(ranks.rank)
        rows = first // arguments.block, num_blocks(last, arguments.block)
        whole = BlockMask.from_dense(dense, size, tokens, tokens)
        # As narrow a table as a selector makes.
        self.mask = replace(whole, indices=whole.indices[..., : int(whole.counts.max())]).query_rows(*rows)
        shape = 1, tokens, arguments.heads, arguments.head_dim
        dtype = getattr(torch, arguments.dtype)
        query, *keys = random_inputs(shape, dtype, ranks.device, 0)
        self.query = query[:, first:last].contiguous()
        self.key, self.value = (x[:, first:last].contiguous() for x in keys)
        request = KernelRequest(ranks.device, dtype, arguments.head_dim, size, needs_lse=True)
        kernel, scale = select_kernel(arguments.backend, request, log=False), arguments.head_dim**-0.5
        self.kernel = kernel.info.name
        self._attend: Attend = lambda q, k, v, m: kernel(q, k, v, _given(m), scale)
        self._expected = self._attend(self.query, keys[0], keys[1], self.mask)[0]

    def measure(self, exchange: str, aside: Aside) -> dict[str, Any]:
        """A result. A collective call."""
        arguments, timer = self._arguments, Timer(self._ranks, self._arguments.warmup, self._arguments.repeat)
        strategy = self.strategy(exchange, aside)
        attended = self.whole(strategy)
        error = max(self._ranks.gather(_relative_error(attended, self._expected)))
        whole = timer(lambda _: self.whole(strategy))  # first, or what is held below would count as its memory
        held = [(key.clone(), value.clone(), mask) for key, value, mask in self._parts(strategy)[1]]
        attention = timer(lambda _: self._merged(len(held), iter(held)))
        alone = timer(lambda _: [None for _ in self._parts(strategy)[1]])
        lists = timer(lambda _: self._lists(aside)) if exchange == "pruned" else None
        return {
            "what": "traffic",
            "exchange": exchange,
            "gpus": self._ranks.world,
            "p2p_disabled": os.environ.get("NCCL_P2P_DISABLE") == "1",
            "sequence": self.shards.sequence_length,
            "heads": arguments.heads,
            "head_dim": arguments.head_dim,
            "block": arguments.block,
            "dtype": arguments.dtype,
            "kernel": self.kernel,
            "mask": self._name,
            "density": round(float(self._dense.double().mean()), 4),
            "needed": round(needed_share(self._dense, self._ranks.world), 4),
            "bytes_sent": self.bytes_sent(exchange),
            "ms_attention": round(attention.median, 3),
            "ms_exchange": round(alone.median, 3),
            "ms_whole": round(whole.median, 3),
            "ms_whole_least": round(whole.least, 3),
            "ms_whole_most": round(whole.most, 3),
            # Until the host knows what comes and goes; part of the exchange.
            "ms_lists": None if lists is None else round(lists.median, 3),
            "peak_memory": whole.peak_memory,
            "error": error,
        }

    def strategy(self, exchange: str, aside: Aside) -> SequenceParallelStrategy:
        block = self._arguments.block
        if exchange == "pruned":
            return PrunedKVStrategy(self._mesh, block, aside=aside)
        return (AllGatherKVStrategy if exchange == "all_gather" else SequenceParallelStrategy)(self._mesh, block)

    def whole(self, strategy: SequenceParallelStrategy) -> Tensor:
        """Exchange and attention: this rank's rows, `[1, S_rank, H, D]`. A collective call."""
        return strategy.attend(self._attend, self.query, self.key, self.value, self.mask, self.shards)[0]

    def bytes_sent(self, exchange: str) -> int:
        """Of the rank that sends most: keys and values, and for pruned ones the lists."""
        arguments, world = self._arguments, self._ranks.world
        token = 2 * self.key.element_size() * arguments.head_dim
        if exchange == "ring":
            hops = range(world - 1)
            lengths = [sum(self.shards.lengths[(r - hop) % world] for hop in hops) for r in range(world)]
            return max(lengths) * arguments.heads * token
        if exchange == "all_gather":
            return max(self.shards.lengths) * (world - 1) * arguments.heads * token
        cut = SequenceShards.aligned(self._dense.shape[-1], 1, 1, world)
        lists = max(cut.lengths) * (world - 1) * arguments.heads
        return int(_needed(self._dense, cut).sum(0).max()) * arguments.block * token + lists

    def _parts(self, strategy: SequenceParallelStrategy) -> tuple[int, Iterator[Part]]:
        group = self._mesh.ring_group
        assert group is not None, "a ring of two ranks or more"
        return strategy.parts(self.key, self.value, self.mask, self.shards, group)

    def _merged(self, count: int, parts: Iterator[Part]) -> Tensor:
        results = PartialResults(count, self.key.dtype)
        for key, value, mask in parts:
            results.add(*self._attend(self.query, key, value, mask))
        return results.out

    def _lists(self, aside: Aside) -> None:
        group = self._mesh.ring_group
        assert group is not None, "a ring of two ranks or more"
        first, last = self.shards.range_of(self._ranks.rank)
        Lists.exchange(self.mask.cut_keys(first, last)[1], self.shards.edges, group, aside).counts(aside)


def _given(mask: BlockMask | None) -> BlockMask:
    assert mask is not None, "nothing here is dense"
    return mask


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())


if __name__ == "__main__":
    sys.exit(main())
