"""`benchmark kernels`: the block-sparse attention kernels, dense attention and the block means on one GPU.

Every key block list is random and of equal length, the worst case for the L2 cache. Writes one JSON object a line and
prints a table last. Attended TFLOP/s count 4 * D operations for every attended (query, key) pair. `plan_ms` is what
flashinfer spends on the host for a new mask, besides the call; kernels whose package is missing are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.benchmarks.results import Row, environment
from sp_sparse.kernels.base import Kernel, KernelInfo
from sp_sparse.kernels.fa4 import FA4Kernel, block_lists
from sp_sparse.kernels.flashinfer import FlashInferKernel
from sp_sparse.kernels.registry import KernelRequest, load_kernel, why_not
from sp_sparse.kernels.triton import TritonKernel
from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.selection.summaries import block_means

# Dense attention and block means are timed as rows of their own.
DENSE, MEANS = "cudnn_dense", "block_means"
COLUMNS = (
    "kernel",
    "sequence",
    "block_size",
    "density",
    "ms_median",
    "ms_min",
    "ms_max",
    "plan_ms",
    "tflops_attended",
    "gb_per_s",
)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    device = torch.device("cuda")
    torch.manual_seed(0)
    rows = []
    for row in measure(args, device):
        rows.append(row)
        print(
            f"{row['kernel']} {row['sequence']} {row['block_size']} {row['density']}: {row['ms_median']} ms", flush=True
        )
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[32760, 75600], help="tokens")
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.1], help="share of key blocks kept"
    )
    parser.add_argument("--block-sizes", nargs="+", default=["128x128", "128x64", "64x64"], help="query x key tokens")
    parser.add_argument(
        "--kernels", nargs="+",
        default=["fa4", "fa4_bare", "triton", "triton_pointers", "flashinfer", DENSE, MEANS],
        help="names that --sparse-attn-backend takes, fa4_bare (the package called directly), triton_pointers (no TMA), "
        "cudnn_dense, block_means",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--output", type=Path, help="file that JSON lines are added to")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows in the order in which they are measured."""
    for sequence in args.sequences:
        shape = (1, sequence, args.heads, args.head_dim)
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
        pairs = float(args.heads) * sequence * sequence
        if DENSE in args.kernels:
            row = describe(args, DENSE, sequence, "-", 1.0, device)
            yield row | timing(args, partial(dense, query, key, value), pairs)
        for block_size in map(parse_block_size, args.block_sizes):
            yield from measure_blocks(args, block_size, query, key, value)


def measure_blocks(
    args: argparse.Namespace, block_size: tuple[int, int], query: Tensor, key: Tensor, value: Tensor
) -> Iterator[Row]:
    """Rows of one sequence length and block size: the means of the key blocks, then every kernel at every density."""
    device, sequence, name = query.device, query.shape[1], "{}x{}".format(*block_size)
    scale = args.head_dim**-0.5
    if MEANS in args.kernels:
        times = timing(args, partial(block_means, key, block_size[1]), 0)
        bandwidth = {"gb_per_s": round(key.nbytes / times["ms_median"] / 1e6, 1)}
        yield describe(args, MEANS, sequence, name, 1.0, device) | times | bandwidth
    for wanted in args.densities:
        mask = random_mask(args.heads, block_size, sequence, wanted, device)
        pairs, density = mask.attended_pairs().item(), mask.density().item()
        for kernel_name, kernel in kernels(args, block_size, device):
            row = describe(args, kernel_name, sequence, name, density, device)
            row |= timing(args, partial(kernel, query, key, value, mask, scale), pairs)
            if isinstance(kernel, FlashInferKernel):
                row["plan_ms"] = plan_time(args, kernel, query, mask, scale)
            yield row


def describe(
    args: argparse.Namespace, kernel: str, sequence: int, block_size: str, density: float, device: torch.device
) -> Row:
    """What is measured, where and with what."""
    return {
        "what": "kernels", "kernel": kernel, "sequence": sequence, "batch": 1, "heads": args.heads,
        "head_dim": args.head_dim, "dtype": "bfloat16", "block_size": block_size, "density": round(density, 4),
        "warmup": args.warmup, "repetitions": args.repetitions, **environment(device),
    }  # fmt: skip


def timing(args: argparse.Namespace, run: Callable[[], object], pairs: float) -> Row:
    """Milliseconds of a call, and attended TFLOP/s where it attends `pairs` (query, key) pairs."""
    times = time_calls(run, args.warmup, args.repetitions)
    median = statistics.median(times)
    return {
        "ms_median": round(median, 4),
        "ms_min": round(min(times), 4),
        "ms_max": round(max(times), 4),
        "tflops_attended": round(4 * args.head_dim * pairs / median / 1e9, 1) if pairs else None,
    }


def plan_time(
    args: argparse.Namespace, kernel: FlashInferKernel, query: Tensor, mask: BlockMask, scale: float
) -> float:
    """Median milliseconds of the host from a mask it has not seen to the plan."""
    times = []
    for _ in range(args.repetitions):
        new = replace(mask)
        torch.cuda.synchronize()
        start = time.perf_counter()
        kernel.plan(query, new, scale)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 4)


class BareFA4:
    """The package's own forward, with nothing around it: what the kernel `fa4` adds shows in comparison."""

    info: KernelInfo = FA4Kernel.info

    def missing(self) -> str | None:
        return FA4Kernel().missing()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd

        lists = BlockSparseTensorsTorch(**block_lists(mask), block_size=mask.block_size)
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True
        )
        return out, lse


# Variants of kernels that are only measured.
VARIANTS: dict[str, Callable[[], Kernel]] = {"fa4_bare": BareFA4, "triton_pointers": partial(TritonKernel, tma=False)}


def kernels(
    args: argparse.Namespace, block_size: tuple[int, int], device: torch.device
) -> Iterator[tuple[str, Kernel]]:
    """The asked-for kernels that can run here; says why of the others."""
    request = KernelRequest(device, torch.bfloat16, args.head_dim, block_size, needs_lse=False)
    for name in args.kernels:
        if name in (DENSE, MEANS):
            continue
        kernel = VARIANTS[name]() if name in VARIANTS else load_kernel(name)
        reason = why_not(kernel, request)
        if reason is None:
            yield name, kernel
        else:
            print(f"{name} is left out: {reason}")


def random_mask(
    heads: int, block_size: tuple[int, int], length: int, density: float, device: torch.device
) -> BlockMask:
    """Every query block of every head attends as many key blocks, drawn at random."""
    rows, columns = (num_blocks(length, size) for size in block_size)
    count = max(1, round(density * columns))
    indices = torch.rand(1, heads, rows, columns, device=device).topk(count).indices.sort().values.int()
    counts = torch.full(indices.shape[:3], count, dtype=torch.int32, device=device)
    return BlockMask(indices, counts, block_size, length, length)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def time_calls(run: Callable[[], object], warmup: int, repetitions: int) -> list[float]:
    """Milliseconds of each call between CUDA events."""
    for _ in range(warmup):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def parse_block_size(text: str) -> tuple[int, int]:
    query, _, key = text.partition("x")
    return int(query), int(key)


def table(rows: list[Row]) -> str:
    lines = [[str("-" if row.get(column) is None else row[column]) for column in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(COLUMNS, *lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) for cells in [list(COLUMNS), *lines]
    )
