"""Checks the invariant at full size over NCCL (or gloo): every mesh gives the masks and the output of one device.

    torchrun --nproc-per-node 2 launch/check_invariant.py --grids 21x30x52 21x45x80

For every mesh of the ranks and every grid it compares, on every rank: the block masks bit for bit with those of a single
device; the output with that of a single device; and sampled rows with float64 dense attention under the expanded mask,
beside the error of attention in the same precision. What a mask leaves out counts as --remainder says. It prints one table
and, with --output, JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.results import environment  # noqa: E402
from launch.benchmarks.timing import Timer  # noqa: E402
from sp_sparse import (  # noqa: E402
    AttentionRecorder,
    SequenceParallelMesh,
    SparseAttention,
    SparseAttentionConfig,
    VideoGrid,
)
from sp_sparse.config import KV_EXCHANGES, REMAINDERS  # noqa: E402
from sp_sparse.generate.ranks import Ranks  # noqa: E402


@dataclass(frozen=True)
class Result:
    """One mesh, grid and density; errors are root mean squares relative to the expected values, the worst of all ranks.

    `kv_exchange` is None without a ring.
    """

    what: str
    gpus: int
    ulysses: int
    ring: int
    sequence: int
    heads: int
    head_dim: int
    density: float
    kernel: str
    remainder: str
    kv_exchange: str | None
    masks_identical: bool
    error_against_one_device: float
    error_against_float64: float
    same_precision_error: float
    ms_one_device: float
    ms_mesh: float


def main() -> int:
    arguments = _arguments()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    world = dist.get_world_size() if dist.is_initialized() else 1
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    results = []
    for ulysses in (d for d in range(1, world + 1) if world % d == 0):
        mesh = SequenceParallelMesh(ulysses, world // ulysses)
        exchanges = arguments.kv_exchange if mesh.ring_degree > 1 else [None]
        for grid, topk, exchange in product(arguments.grids, arguments.topk, exchanges):
            results.append(_check(mesh, grid, topk, exchange, arguments, device))
    failed = [r for r in results if not _passes(r)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        _print_table(results)
        if arguments.output:
            with open(arguments.output, "a") as file:
                for result in results:
                    file.write(json.dumps({**asdict(result), **environment(device)}) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check that every mesh gives the single-device sparse result.")
    parser.add_argument("--grids", nargs="+", type=_grid, default=[VideoGrid(21, 30, 52)], help="TxHxW in tokens")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--topk", nargs="+", type=float, default=[0.3])
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--kv-exchange", nargs="+", choices=KV_EXCHANGES, default=["ring"], help="on a ring, one after another"
    )
    parser.add_argument("--remainder", choices=REMAINDERS, default="drop")
    parser.add_argument("--token-order", default="hilbert")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls; 0 times nothing")
    parser.add_argument("--output", help="JSON lines are appended here")
    return parser.parse_args()


def _grid(text: str) -> VideoGrid:
    frames, height, width = (int(side) for side in text.split("x"))
    return VideoGrid(frames, height, width)


def _inputs(grid: VideoGrid, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The whole q, k, v, the same on every rank; scaled so that attention is far from uniform."""
    generator = torch.Generator(device).manual_seed(grid.num_tokens)
    shape = (1, grid.num_tokens, heads, head_dim)
    # Neighbouring tokens share a direction, so that blocks differ and the selection means something.
    coarse = torch.randn(1, -(-grid.num_tokens // 100), heads, head_dim, generator=generator, device=device)
    common = coarse.repeat_interleave(100, 1)[:, : grid.num_tokens]
    tensors = []
    for shared in (1.0, 1.0, 0.0):
        noise = torch.randn(shape, generator=generator, device=device)
        tensors.append((noise + shared * common).to(dtype))
    return tensors


def _check(
    mesh: SequenceParallelMesh,
    grid: VideoGrid,
    topk: float,
    exchange: str | None,
    arguments: argparse.Namespace,
    device: torch.device,
) -> Result:
    size = (arguments.block_size, arguments.block_size)
    config = SparseAttentionConfig(
        backend=arguments.backend,
        topk=topk,
        schedule="constant",
        token_order=arguments.token_order,
        block_size=size,
        kv_exchange=exchange or "ring",
        remainder=arguments.remainder,
    )
    q, k, v = _inputs(grid, arguments.heads, arguments.head_dim, getattr(torch, arguments.dtype), device)
    kept = {name: AttentionRecorder(keep_masks=True) for name in ("one", "mesh")}

    def layer(on: SequenceParallelMesh, recorder: AttentionRecorder | None) -> SparseAttention:
        return SparseAttention(
            config,
            on,
            num_heads=arguments.heads,
            head_dim=arguments.head_dim,
            recorder=recorder,
            check_calls=False,  # as within a model, where a layer never waits for the device
        )

    expected = layer(SequenceParallelMesh(), kept["one"])(q, k, v, grid=grid)
    attention = layer(mesh, kept["mesh"])
    shards = attention.shards(grid)
    first, last = shards.range_of(mesh.sequence_rank)
    local = [x[:, first:last].contiguous() for x in (q, k, v)]
    out = attention(*local, grid=grid)
    mask = kept["one"].masks[0][-1].to_dense()
    start, stop = shards.grouped(mesh.ulysses_degree).range_of(mesh.ring_rank)
    heads = attention.strategy.heads(arguments.heads)
    first_head = sum(heads[: mesh.ulysses_rank])
    wanted = mask[:, first_head : first_head + heads[mesh.ulysses_rank], start // size[0] : -(-stop // size[0])]
    same = torch.equal(kept["mesh"].masks[0][-1].to_dense(), wanted)
    against_64, same_precision = _sampled_errors(q, k, v, mask, out, (first, last), size, arguments.remainder)
    numbers = [0.0 if same else 1.0, _relative(out, expected[:, first:last]), against_64, same_precision]
    del expected, mask, kept["one"].masks[:]
    one = layer(SequenceParallelMesh(), None)
    unrecorded = layer(mesh, None)
    kernel = next(iter(kept["mesh"].summary(mesh.groups)["calls"]))
    if device.type == "cuda" and kernel != "flashinfer":  # which plans each mask on the host
        unrecorded(*local, grid=grid)  # compiles, and plans the shape
        torch.cuda.set_sync_debug_mode("error")
        unrecorded(*local, grid=grid)
        torch.cuda.set_sync_debug_mode("default")
    numbers.append(_milliseconds(lambda: one(q, k, v, grid=grid), arguments.repeat, device))
    numbers.append(_milliseconds(lambda: unrecorded(*local, grid=grid), arguments.repeat, device))
    worst = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    different, *errors = worst.tolist()
    return Result(
        "invariant", mesh.sequence_degree, mesh.ulysses_degree, mesh.ring_degree, grid.num_tokens, arguments.heads,
        arguments.head_dim, topk, kernel, arguments.remainder, exchange, different == 0.0, *errors,
    )  # fmt: skip


def _sampled_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    held: tuple[int, int],
    size: tuple[int, int],
    remainder: str,
) -> tuple[float, float]:
    """Errors against float64 of some of this rank's rows and heads: ours, and those of attention in the same precision."""
    heads = q.shape[2]
    rows = torch.linspace(held[0], held[1] - 1, 192, device=q.device).long()
    ours, same, exact = [], [], []
    for head in range(0, heads, max(1, heads // 4)):
        chosen = mask[0, head, rows // size[0]]
        queries, keys, values = q[0, rows, head], k[0, :, head], v[0, :, head]
        exact.append(_attend(queries.double(), keys.double(), values.double(), chosen, size[1], remainder))
        same.append(_attend(queries, keys, values, chosen, size[1], remainder))
        ours.append(out[0, rows - held[0], head])
    expected = torch.stack(exact)
    return _relative(torch.stack(ours), expected), _relative(torch.stack(same), expected)


def _attend(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block: int, remainder: str) -> Tensor:
    """Rows `[R, D]` over `[S, D]` keys and values of which each row attends the blocks `chosen`, `[R, Nk]`; what is left out
    as `remainder` says. Scores and the softmax are in fp32 for lower precisions."""
    length, head_dim = key.shape
    compute = torch.promote_types(key.dtype, torch.float32)
    scale = head_dim**-0.5
    allowed = chosen.repeat_interleave(block, 1)[:, :length]
    scores = (query.to(compute) @ key.to(compute).T * scale).masked_fill(~allowed, float("-inf"))
    if remainder == "drop":
        return scores.softmax(-1).to(value.dtype) @ value
    tokens = torch.full((chosen.shape[1],), block, dtype=compute, device=key.device)
    tokens[-1] = length - (chosen.shape[1] - 1) * block
    padded = [F.pad(x.to(compute), (0, 0, 0, -length % block)).unflatten(0, (-1, block)) for x in (key, value)]
    means = [(x.sum(1) / tokens[:, None]).to(key.dtype) for x in padded]
    rest = query.to(compute) @ means[0].to(compute).T * scale + tokens.log()
    weights = torch.cat([scores, rest.masked_fill(chosen, float("-inf"))], 1).softmax(-1)
    out = weights.to(value.dtype) @ torch.cat([value, means[1]])
    if remainder == "linear":
        centred = key.to(compute) - means[0].to(compute).repeat_interleave(block, 0)[:length]
        slope = centred.T @ value.to(compute) * (scale / length)
        out = out + (weights[:, length:].sum(1, keepdim=True) * (query.to(compute) @ slope)).to(value.dtype)
    return out


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt()).item()


def _milliseconds(call: Callable[[], Any], repeat: int, device: torch.device) -> float:
    """Median time of a call on the slowest rank; 0 where nothing is timed."""
    if repeat == 0:
        return 0.0
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Timer(Ranks(rank, world, device), warmup=2, repeat=repeat)(lambda _: call()).median


def _passes(result: Result) -> bool:
    within = result.error_against_float64 <= 2 * result.same_precision_error
    return result.masks_identical and within and result.error_against_one_device <= 2 * result.same_precision_error


def _print_table(results: list[Result]) -> None:
    print(
        "gpus UxR    S      density kernel     masks      vs one device  vs float64  same precision  ms 1    ms mesh"
        "  exchange"
    )
    for r in results:
        print(
            f"{r.gpus:4d} {r.ulysses}x{r.ring} {r.sequence:8d} {r.density:7.2f}  {r.kernel:10s}"
            f" {'identical' if r.masks_identical else 'DIFFERENT'}  {r.error_against_one_device:12.3e}"
            f"  {r.error_against_float64:10.3e}  {r.same_precision_error:13.3e}  {r.ms_one_device:7.2f} {r.ms_mesh:7.2f}"
            f"  {r.kv_exchange or '-':10s}{'' if _passes(r) else '  FAILED'}"
        )


if __name__ == "__main__":
    sys.exit(main())
