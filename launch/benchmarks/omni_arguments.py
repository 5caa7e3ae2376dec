"""Flags of benchmark_vllm_omni.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.benchmarks.arguments import Mesh, filled, pair, positive, video


@dataclass(frozen=True)
class OmniArguments:
    """What is checked and timed; the fields are the flags."""

    videos: dict[str, tuple[int, int, int]]
    meshes: tuple[Mesh, ...]
    sparsities: tuple[float, ...]
    dense: tuple[str, ...]
    backend: str
    block_size: tuple[int, int]
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_tokens: int
    text_dim: int
    dtype: str
    device: str
    compile: bool
    tolerance: float
    model_tolerance: float
    warmup: int
    repeat: int
    output: Path | None
    time_limit_s: float | None
    timeout_s: float

    def all_meshes(self, world: int) -> tuple[Mesh, ...]:
        """One rank, then the meshes asked for, or else all ranks by Ulysses and all by ring.

        Raises:
            ValueError: a mesh that does not take all ranks.
        """
        wrong = [mesh for mesh in self.meshes if mesh[0] * mesh[1] != world]
        if wrong:
            raise ValueError(f"--meshes {wrong[0][0]}x{wrong[0][1]} does not take the {world} ranks; choose another")
        several = self.meshes or ((world, 1), (1, world))
        return ((1, 1), *(mesh for mesh in several if mesh != (1, 1)))


def parse_omni_arguments(argv: Sequence[str] | None) -> OmniArguments:
    """Read the flags."""
    parser = argparse.ArgumentParser(description="SP_SPARSE within vllm-omni's Wan transformer: checked and timed.")
    parser.add_argument("--videos", nargs="+", type=video, default=None, help="480p, 720p, or TxHxW latents")
    parser.add_argument("--meshes", nargs="+", type=pair, default=[], help="UxR of all ranks (default: Ux1 and 1xR)")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.9], help="shares of key blocks left out")
    parser.add_argument(
        "--dense", nargs="+", default=["auto"], help="vllm-omni's dense backends; auto is its default for the platform"
    )
    parser.add_argument("--backend", default="auto", help="kernel")
    parser.add_argument("--block-size", type=pair, default=(128, 128), help="query x key tokens")
    parser.add_argument("--layers", type=positive, default=4, help="the real model has 40")
    parser.add_argument("--heads", type=positive, default=40)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--ffn-dim", type=positive, default=13824)
    parser.add_argument("--text-tokens", type=positive, default=512)
    parser.add_argument("--text-dim", type=positive, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as vllm-omni's server does")
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="largest relative error of a layer against one rank"
    )
    parser.add_argument("--model-tolerance", type=float, default=5e-2, help="the same of the whole model")
    parser.add_argument("--warmup", type=positive, default=2, help="calls before the timed ones")
    parser.add_argument("--repeat", type=positive, default=5, help="timed calls")
    parser.add_argument("--output", type=Path, help="file that JSON lines are added to")
    parser.add_argument("--time-limit-s", type=float, help="start no measurement after so many seconds")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="seconds that a rank waits for the others")
    given = vars(parser.parse_args(argv))
    given["videos"] = dict(given["videos"] or [video("480p"), video("720p")])
    return filled(OmniArguments, given)
