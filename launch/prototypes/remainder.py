"""What the parts of the remainder cost on a GPU, and its kernel under other launch settings.

`python -m launch.prototypes.remainder` times, at the size of one layer of A14B, the means of keys and values, the table of
biases, and the pass that attends the means; the last one with every tile, number of warps, stages and registers that is
tried. What wins goes into `remainder/triton_attend.py`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from unittest import mock

import torch

from sp_sparse.kernels.triton_config import LaunchConfig
from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.remainder import triton_attend, triton_means
from sp_sparse.selection.summaries import block_means

_SETTINGS = [
    LaunchConfig(tile, warps, stages, registers)
    for tile, warps, stages, registers in itertools.product((64, 128), (4, 8), (1, 2, 3), (None, 128))
    if not (warps == 4 and registers == 128)
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--repeat-ms", type=int, default=60, help="how long each is repeated")
    arguments = parser.parse_args()
    query, key, value = _inputs(arguments)
    mask = _mask(arguments)
    scale, block = arguments.head_dim**-0.5, arguments.block
    tokens, slope = triton_means.block_means_triton(key, value, block, True)
    out, lse = torch.zeros_like(query), query.new_zeros(1, arguments.heads, arguments.tokens, dtype=torch.float32)

    def attend() -> None:
        triton_attend.add_remainder_triton(out, lse, query, tokens, slope, mask, scale)

    def show(name: str, call: Callable[[], object]) -> None:
        print(f"{name:44} {_milliseconds(call, arguments.repeat_ms):7.3f} ms", flush=True)

    show("means of keys, as selection takes them", lambda: block_means(key, block))
    show("means of keys and values", lambda: triton_means.block_means_triton(key, value, block, False))
    show("the same and the matrix", lambda: triton_means.block_means_triton(key, value, block, True))
    show("biases", lambda: triton_attend.make_biases(mask, 128))
    show("biases and the pass, as they are launched", attend)
    for config in _SETTINGS:
        with mock.patch.object(triton_attend, "launch_config", lambda *_, config=config: config):
            try:
                show(str(config).removeprefix("LaunchConfig"), attend)
            except Exception as error:  # shared memory or registers that there are not
                print(f"{config}: {type(error).__name__}", flush=True)
    return 0


def _inputs(arguments: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, arguments.tokens, arguments.heads, arguments.head_dim)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def _mask(arguments: argparse.Namespace) -> BlockMask:
    """As many blocks of every row, at random."""
    blocks = num_blocks(arguments.tokens, arguments.block)
    generator = torch.Generator("cuda").manual_seed(1)
    order = torch.rand(1, arguments.heads, blocks, blocks, generator=generator, device="cuda").argsort(-1)
    chosen = order < round(arguments.density * blocks)
    return BlockMask.from_dense(chosen, (arguments.block, arguments.block), arguments.tokens, arguments.tokens)


def _milliseconds(call: Callable[[], object], repeat_ms: int) -> float:
    from triton.testing import do_bench

    found: float = do_bench(call, warmup=10, rep=repeat_ms, return_mode="median")
    return found


if __name__ == "__main__":
    sys.exit(main())
