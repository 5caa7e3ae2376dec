"""What it costs that ranks agree at every forward: `torchrun … launch/benchmark_agreement.py`; --help lists.

A sparse Wan transformer in the width of A14B runs forwards one after another, as a denoising loop does, with what ranks
agree on at each forward and, in turns, without it. The difference is what agreeing costs, the wait for the device included.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.results import environment  # noqa: E402
from sp_sparse import SequenceParallelMesh, SparseAttentionConfig  # noqa: E402
from sp_sparse.generate.random_models import random_a14b_transformer  # noqa: E402
from sp_sparse.generate.ranks import Ranks, start_ranks  # noqa: E402
from sp_sparse.integrations.diffusers import enable_sparse_attention  # noqa: E402
from sp_sparse.integrations.diffusers.agree import ForwardAgreement  # noqa: E402

_REAL_LAYERS = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--latents", type=int, nargs=3, default=(21, 60, 104), help="of the video; default 480p x 81 frames"
    )
    parser.add_argument("--topk", type=float, default=0.3)
    parser.add_argument("--forwards", type=int, default=8, help="forwards of a loop that is timed as a whole")
    parser.add_argument("--repeat", type=int, default=7, help="loops of either kind")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="narrow, to try it on CPUs")
    parser.add_argument("--output", help="JSON lines are appended here")
    arguments = parser.parse_args()
    with start_ranks("auto", 300.0) as ranks:
        for ulysses in (d for d in range(1, ranks.world + 1) if ranks.world % d == 0):
            row = _measure(ranks, SequenceParallelMesh(ulysses, ranks.world // ulysses), arguments)
            if ranks.first:
                print(json.dumps(row))
                if arguments.output:
                    with open(arguments.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps({**row, **environment(ranks.device)}) + "\n")
    return 0


def _measure(ranks: Ranks, mesh: SequenceParallelMesh, arguments: argparse.Namespace) -> dict[str, object]:
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    narrow = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64} if arguments.small else {}
    model = random_a14b_transformer(arguments.layers, device, dtype, **narrow)
    config = SparseAttentionConfig(backend="auto", topk=arguments.topk, schedule="constant")
    handle = enable_sparse_attention(model, config, mesh)
    if arguments.compile:
        model.compile_repeated_blocks()
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn((1, 16, *arguments.latents), generator=generator, dtype=dtype, device=device)
    text = torch.randn((1, 512, 4096), generator=generator, dtype=dtype, device=device)
    timestep = torch.tensor([500], device=device)

    @torch.no_grad()
    def loop() -> float:
        _finish(device)
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        for _ in range(arguments.forwards):
            model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
        _finish(device)
        return max(ranks.gather((time.perf_counter() - start) / arguments.forwards * 1e3))

    passing = mock.patch.object(
        ForwardAgreement, "__call__", lambda self, settings, branch, args, kwargs: (args, kwargs)
    )
    loop()
    agreed, alone = [], []
    for _ in range(arguments.repeat):
        agreed.append(loop())
        with passing:
            alone.append(loop())
    handle.remove()
    cost = statistics.median(a - b for a, b in zip(agreed, alone, strict=True))
    forward = statistics.median(alone)
    return {
        "what": "agreement",
        "gpus": ranks.world,
        "ulysses": mesh.ulysses_degree,
        "ring": mesh.ring_degree,
        "layers": arguments.layers,
        "compiled": arguments.compile,
        "latents": list(arguments.latents),
        "density": arguments.topk,
        "ms_forward": round(forward, 3),
        "ms_agreement": round(cost, 3),
        "percent": round(100 * cost / forward, 3),
        # Agreeing costs the same whatever the depth: of a forward of 40 layers, extrapolated by the number of layers.
        "percent_of_40_layers": round(100 * cost / (forward * _REAL_LAYERS / arguments.layers), 3),
        "ms_agreed": [round(ms, 3) for ms in agreed],
        "ms_alone": [round(ms, 3) for ms in alone],
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
