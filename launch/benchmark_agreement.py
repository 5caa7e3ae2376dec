"""What it costs that ranks agree: `torchrun --nproc-per-node 2 launch/benchmark_agreement.py`; --help lists.

Loops over a sparse Wan transformer in the width of A14B run with all that ranks agree on and, in turns, without it; the
difference is what agreeing costs, waits for the device included. Three kinds of loops, each on every mesh of the ranks:

* transformer: forwards of one transformer alone, whose latents are compared too;
* pipeline: steps with guidance of a whole WanPipeline, from embeddings to latents, its scheduler's sample shared;
* halves: the same with guidance on two halves of the ranks, which meet at both ends of a step.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.results import environment  # noqa: E402
from sp_sparse import SequenceParallelMesh, SparseAttentionConfig  # noqa: E402
from sp_sparse.generate.random_models import random_a14b, random_a14b_transformer  # noqa: E402
from sp_sparse.generate.ranks import Ranks, start_ranks  # noqa: E402
from sp_sparse.integrations.diffusers import agree, cfg, enable_sparse_attention, forward_end  # noqa: E402
from sp_sparse.parallel.failures import Standing  # noqa: E402

_REAL_LAYERS = 40
_NARROW = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64}
_COLUMNS = ("loop", "cfg", "ulysses", "ring", "compiled", "ms_alone", "ms_agreement", "percent_of_40_layers")

# Runs so many forwards, or steps.
Loop = Callable[[int], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--latents", type=int, nargs=3, default=(21, 60, 104), help="of the video; default 480p x 81 frames"
    )
    parser.add_argument("--topk", type=float, default=0.3)
    parser.add_argument("--times", type=int, default=8, help="forwards, or steps, of a loop that is timed as a whole")
    parser.add_argument("--repeat", type=int, default=7, help="loops with agreement, and as many without")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true", help="narrow, to try it on CPUs")
    parser.add_argument("--output", help="JSON lines are appended here")
    arguments = parser.parse_args()
    rows = []
    with start_ranks("auto", 300.0) as ranks:
        degrees = [d for d in range(1, ranks.world + 1) if ranks.world % d == 0]
        cases = [(kind, u, ranks.world // u, 1) for kind in ("transformer", "pipeline") for u in degrees]
        half = ranks.world // 2
        cases += [("halves", u, half // u, 2) for u in degrees if ranks.world % 2 == 0 and half % u == 0]
        for kind, ulysses, ring, halves in cases:
            mesh = SequenceParallelMesh(ulysses, ring, halves)
            rows.append(_measure(ranks, kind, mesh, arguments))
            if ranks.first and arguments.output:
                with open(arguments.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**rows[-1], **environment(ranks.device)}) + "\n")
        if ranks.first:
            print(_table(rows))
    return 0


def _measure(ranks: Ranks, kind: str, mesh: SequenceParallelMesh, arguments: argparse.Namespace) -> dict[str, object]:
    device = ranks.device
    loop = (_transformer_loop if kind == "transformer" else _pipeline_loop)(device, mesh, arguments)

    @torch.no_grad()
    def timed() -> float:
        _finish(device)
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        loop(arguments.times)
        _finish(device)
        return max(ranks.gather((time.perf_counter() - start) / arguments.times * 1e3))

    timed()
    agreed, alone = [], []
    for _ in range(arguments.repeat):
        agreed.append(timed())
        with _nothing_agreed():
            alone.append(timed())
    cost = statistics.median(a - b for a, b in zip(agreed, alone, strict=True))
    median = statistics.median(alone)
    return {
        "what": "agreement",
        "loop": kind,
        "gpus": ranks.world,
        "cfg": mesh.cfg_degree,
        "ulysses": mesh.ulysses_degree,
        "ring": mesh.ring_degree,
        "layers": arguments.layers,
        "compiled": arguments.compile,
        "latents": list(arguments.latents),
        "density": arguments.topk,
        # Of a forward of the transformer, else of a step.
        "ms_alone": round(median, 3),
        "ms_agreement": round(cost, 3),
        "percent": round(100 * cost / median, 3),
        # Agreeing costs the same whatever the depth: of 40 layers, extrapolated by the number of layers.
        "percent_of_40_layers": round(100 * cost / (median * _REAL_LAYERS / arguments.layers), 3),
        "every_ms_agreed": [round(ms, 3) for ms in agreed],
        "every_ms_alone": [round(ms, 3) for ms in alone],
    }


def _transformer_loop(device: torch.device, mesh: SequenceParallelMesh, arguments: argparse.Namespace) -> Loop:
    narrow = _NARROW if arguments.small else {}
    model = random_a14b_transformer(arguments.layers, device, _dtype(device), **narrow)
    enable_sparse_attention(model, _config(arguments), mesh)
    if arguments.compile:
        model.compile_repeated_blocks()
    latents, text = _latents(device, arguments), _text(device, 0)
    timestep = torch.tensor([500], device=device)

    def loop(times: int) -> None:
        for _ in range(times):
            # New at each forward, as a loop's latents are.
            model(latents.clone(), timestep=timestep.clone(), encoder_hidden_states=text, return_dict=False)

    return loop


def _pipeline_loop(device: torch.device, mesh: SequenceParallelMesh, arguments: argparse.Namespace) -> Loop:
    pipe = random_a14b(arguments.layers, device, _dtype(device), None, **(_NARROW if arguments.small else {}))
    pipe.set_progress_bar_config(disable=True)
    enable_sparse_attention(pipe, _config(arguments), mesh)
    if arguments.compile:
        for model in (pipe.transformer, pipe.transformer_2):
            model.compile_repeated_blocks()
    latents = _latents(device, arguments)
    frames, height, width = arguments.latents

    def loop(times: int) -> None:
        pipe(
            prompt_embeds=_text(device, 0),
            negative_prompt_embeds=_text(device, 1),
            latents=latents,
            num_frames=(frames - 1) * pipe.vae_scale_factor_temporal + 1,
            height=height * pipe.vae_scale_factor_spatial,
            width=width * pipe.vae_scale_factor_spatial,
            num_inference_steps=times,
            guidance_scale=3.0,
            output_type="latent",
        )

    return loop


@contextmanager
def _nothing_agreed() -> Iterator[None]:
    """The same loops without what ranks compare, share and tell each other."""
    with ExitStack() as patches:
        for owner, name, instead in (
            (agree.ForwardAgreement, "__call__", lambda self, settings, branch, args, kwargs: (args, kwargs)),
            (agree._FirstRanksStep, "__call__", lambda self, *args, **kwargs: self._step(*args, **kwargs)),
            (forward_end.ForwardEnd, "__call__", lambda self, error: error),
            (cfg, "largest", lambda numbers, groups: list(numbers)),
            (Standing, "meet", lambda self, error, groups, where: error),
        ):
            patches.enter_context(mock.patch.object(owner, name, instead))
        yield


def _config(arguments: argparse.Namespace) -> SparseAttentionConfig:
    return SparseAttentionConfig(backend="auto", topk=arguments.topk, schedule="constant")


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _latents(device: torch.device, arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((1, 16, *arguments.latents), generator=generator, dtype=_dtype(device), device=device)


def _text(device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((1, 512, 4096), generator=generator, dtype=_dtype(device), device=device)


def _table(rows: list[dict[str, object]]) -> str:
    cells = [_COLUMNS, *([str(row[name]) for name in _COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
