"""How long the VAE takes, and what memory: whole, in tiles, and with tiles shared: `torchrun … launch/benchmark_decode.py`.

A VAE of real size with random weights decodes random latents. Whole and tiled decodes run on rank 0 alone, shared ones on
all ranks. Started plainly, one GPU runs whole and tiled.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.results import environment  # noqa: E402
from sp_sparse.generate.decode import VideoDecoding  # noqa: E402
from sp_sparse.generate.ranks import Ranks, start_ranks  # noqa: E402
from sp_sparse.generate.stages import peak_bytes, synchronize  # noqa: E402
from sp_sparse.generate.tiles import enable_tiling  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["480x832", "720x1280"], help="height x width")
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the VAE")
    parser.add_argument("--ways", nargs="+", default=["whole", "tiled", "shared"], choices=("whole", "tiled", "shared"))
    parser.add_argument("--repeat", type=int, default=3, help="timed decodes of each, after one that is not")
    parser.add_argument("--small", action="store_true", help="narrow, to try it on CPUs")
    parser.add_argument("--output", help="JSON lines are appended here")
    arguments = parser.parse_args()
    with start_ranks("auto", 900.0) as ranks:
        pipe = _pipe(ranks.device, getattr(torch, arguments.dtype), arguments.small)
        for size in arguments.sizes:
            height, width = map(int, size.split("x"))
            for way in arguments.ways:
                if way == "shared" and ranks.world == 1:
                    continue
                row = _measure(ranks, pipe, way, (height, width, arguments.num_frames), arguments.repeat)
                if not ranks.first:
                    continue
                row = {**row, "dtype": arguments.dtype, "small": arguments.small, **environment(ranks.device)}
                print(json.dumps(row), flush=True)
                if arguments.output:
                    with open(arguments.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return 0


def _pipe(device: torch.device, dtype: torch.dtype, small: bool) -> Any:
    """What decoding needs of a pipeline: the VAE of A14B, the same on every rank."""
    from diffusers import AutoencoderKLWan
    from diffusers.video_processor import VideoProcessor

    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(**({"base_dim": 4, "num_res_blocks": 1} if small else {}))
    return SimpleNamespace(vae=vae.eval().to(device, dtype), video_processor=VideoProcessor(vae_scale_factor=8))


def _measure(ranks: Ranks, pipe: Any, way: str, video: tuple[int, int, int], repeat: int) -> dict[str, object]:
    height, width, frames = video
    ratio = pipe.vae.spatial_compression_ratio
    shape = (1, pipe.vae.config.z_dim, (frames - 1) // 4 + 1, height // ratio, width // ratio)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(ranks.device)
    pipe.vae.use_tiling = False
    if way != "whole":
        enable_tiling(pipe.vae)
    # The ranks that do not take part wait, so that nothing else runs.
    working = ranks if way == "shared" else Ranks(ranks.rank, 1, ranks.device)
    tiles, seconds = [0] * ranks.world, []
    for _ in range(repeat + 1):
        synchronize(ranks.device)
        if dist.is_initialized():
            dist.barrier()
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        start = time.perf_counter()
        if way == "shared" or ranks.first:
            decoding = VideoDecoding(pipe, latents, working)
            tiles = decoding.tiles_by_rank
            decoding.work(lambda: None)
            decoding.frames()
        synchronize(ranks.device)
        seconds.append(max(ranks.gather(time.perf_counter() - start)))
    peaks = ranks.gather(peak_bytes(ranks.device))
    return {
        "what": "decode",
        "way": way,
        "gpus": ranks.world if way == "shared" else 1,
        "ranks": ranks.world,
        "height": height,
        "width": width,
        "num_frames": frames,
        "tiles_by_rank": tiles,
        "seconds": round(statistics.median(seconds[1:]), 4),
        "all_seconds": [round(s, 4) for s in seconds[1:]],
        # On GPUs of the decode, weights included; on CPUs of the process since its start.
        "peak_memory_by_rank": peaks,
    }


if __name__ == "__main__":
    sys.exit(main())
