"""The flags of `benchmark`, and what can be refused from them alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sp_sparse import SequenceParallelMesh
from sp_sparse.config import KV_EXCHANGES, REMAINDERS
from sp_sparse.kernels.registry import load_kernel
from sp_sparse.video import TOKEN_ORDERS, VideoGrid

T = TypeVar("T")

# (Ulysses degree, ring degree)
Mesh = tuple[int, int]

# Latent frames, rows and columns of 81 frames; the transformer halves rows and columns.
VIDEOS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}


def every_mesh(world: int) -> tuple[Mesh, ...]:
    """The meshes of so many ranks, most Ulysses first."""
    return tuple((u, world // u) for u in range(world, 0, -1) if world % u == 0)


@dataclass(frozen=True)
class Run:
    """One setting of the layer that is measured on every mesh."""

    backend: str
    density: float
    remainder: str = "drop"

    def __str__(self) -> str:
        return self.backend if self.remainder == "drop" else f"{self.backend}, {self.remainder} remainder"


@dataclass(frozen=True)
class RunArguments:
    """What every measurement on ranks takes; each field is a flag.

    Attributes:
        densities: shares of key blocks, descending.
        backends: kernels, as `--sparse-attn-backend` takes them.
        remainders: what is made of blocks that are not kept.
        meshes: (Ulysses degree, ring degree) pairs; empty for all of the ranks.
    """

    densities: tuple[float, ...]
    backends: tuple[str, ...]
    remainders: tuple[str, ...]
    meshes: tuple[tuple[int, int], ...]
    heads: int
    head_dim: int
    block_size: tuple[int, int]
    token_order: str
    dtype: str
    device: str
    warmup: int
    repeat: int
    output: Path | None
    time_limit_s: float | None
    timeout_s: float

    def check(self, world: int) -> None:
        """Refuse what could not be measured at all.

        Raises:
            ValueError: a mesh that does not fit the ranks, or an unknown backend.
        """
        self.meshes_of(world)
        for backend in self.backends:
            if backend == "none":
                raise ValueError("--backends none leaves nothing to measure; name a kernel, or use auto")
            if backend != "auto":
                load_kernel(backend)

    def build_meshes(self, world: int) -> list[SequenceParallelMesh]:
        """The meshes of `meshes_of`. A collective call."""
        timeout = timedelta(seconds=self.timeout_s)
        return [SequenceParallelMesh(u, r, timeout=timeout) for u, r in self.meshes_of(world)]

    def runs(self) -> list[Run]:
        """Every measurement on a mesh; dense attention once, for it is the same under all."""
        dense = [Run("auto", density) for density in self.densities if density >= 1.0]
        sparse = [density for density in self.densities if density < 1.0]
        return dense + [Run(*run) for run in product(self.backends, sparse, self.remainders)]

    def meshes_of(self, world: int) -> tuple[tuple[int, int], ...]:
        """One rank alone first, for the others are compared with it; then what was asked for, by default every mesh.

        Raises:
            ValueError: a mesh that is neither of one rank nor of all of them.
        """
        every = every_mesh(world)
        wrong = [mesh for mesh in self.meshes if mesh[0] * mesh[1] not in (1, world)]
        if wrong:
            u, r = wrong[0]
            raise ValueError(
                f"--meshes {u}x{r} needs {u * r} ranks, but {world} run; start `torchrun --nproc-per-node {u * r}`, or use "
                f"{', '.join(f'{a}x{b}' for a, b in every)}"
            )
        return tuple(dict.fromkeys(((1, 1), *(self.meshes or every))))


@dataclass(frozen=True)
class LayerArguments(RunArguments):
    """What measurements of one layer take."""

    grids: tuple[VideoGrid, ...]


@dataclass(frozen=True)
class AttentionArguments(LayerArguments):
    """`benchmark attention`."""

    input_sets: int
    kv_exchanges: tuple[str, ...]


@dataclass(frozen=True)
class TimelineArguments(LayerArguments):
    """`benchmark timeline`."""


@dataclass(frozen=True)
class TransformerArguments(RunArguments):
    """`benchmark transformer`; `videos` maps a name to latent frames, rows and columns."""

    videos: dict[str, tuple[int, int, int]]
    layers: int
    ffn_dim: int
    text_tokens: int
    text_dim: int
    modes: tuple[str, ...]
    compile_backend: str


@dataclass(frozen=True)
class PlotArguments:
    """`benchmark plot` and, with `scaling`, `benchmark scaling`."""

    results: tuple[Path, ...]
    output_dir: Path
    scaling: bool


@dataclass(frozen=True)
class QualityArguments:
    """`benchmark quality`."""

    fidelity: tuple[Path, ...]
    speed: tuple[Path, ...]
    document: Path
    output_dir: Path


def parse_arguments(argv: Sequence[str]) -> RunArguments | PlotArguments | QualityArguments:
    """Read the flags of a subcommand.

    Raises:
        ValueError: a flag or value that is not known or out of range.
    """
    parser = _Parser(prog="benchmark.py", description="Measure sp_sparse; every table goes with JSON lines (--output).")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("kernels", help="kernels alone on one GPU; see `benchmark.py kernels --help`")
    commands.add_parser("simulate", help="the layer on more GPUs, modelled; see `benchmark.py simulate --help`")
    attention = commands.add_parser("attention", help="the attention layer on one rank and on meshes")
    _add_run_flags(attention, repeat=10, warmup=3)
    _add_grids(attention)
    attention.add_argument("--kv-exchanges", nargs="+", choices=KV_EXCHANGES, default=["ring"], help="on a ring")
    attention.add_argument("--input-sets", type=positive, default=2, help="random inputs that calls rotate through")
    timeline = commands.add_parser("timeline", help="what each GPU does during one call of the layer")
    _add_run_flags(timeline, repeat=1, warmup=3)
    _add_grids(timeline)
    transformer = commands.add_parser("transformer", help="a Wan transformer of A14B shape with random weights")
    _add_run_flags(transformer, repeat=5, warmup=2)
    transformer.add_argument(
        "--videos", nargs="+", type=video, default=list(VIDEOS.items()), help="480p, 720p, or TxHxW latents"
    )
    transformer.add_argument("--layers", type=positive, default=4, help="the real model has 40")
    transformer.add_argument("--ffn-dim", type=positive, default=13824)
    transformer.add_argument("--text-tokens", type=positive, default=512)
    transformer.add_argument("--text-dim", type=positive, default=4096)
    transformer.add_argument(
        "--modes", nargs="+", choices=("eager", "compiled"), default=["eager"], help="compiled: compile_repeated_blocks"
    )
    transformer.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    for name, what in (("plot", "pictures of results"), ("scaling", "tables and pictures over the number of GPUs")):
        plot = commands.add_parser(name, help=what)
        plot.add_argument("results", nargs="+", type=Path, help="JSON lines of `attention` and `transformer`")
        plot.add_argument("--output-dir", type=Path, required=True)
        plot.set_defaults(scaling=name == "scaling")
    quality = commands.add_parser("quality", help="tables and pictures of quality beside speed, for docs/quality.md")
    quality.add_argument("fidelity", nargs="+", type=Path, help="what sp_sparse.fidelity wrote, as .jsonl or .jsonl.gz")
    quality.add_argument(
        "--speed", nargs="+", type=Path, required=True, help="JSON lines with and without --remainders"
    )
    quality.add_argument("--document", type=Path, default=Path("docs/quality.md"), help="whose tables are renewed")
    quality.add_argument("--output-dir", type=Path, default=Path("docs/quality"), help="of the pictures")
    given = vars(parser.parse_args(argv))
    if given["command"] == "quality":
        return filled(QualityArguments, given)
    if "scaling" in given:
        return filled(PlotArguments, given)
    given["densities"] = sorted(set(given["densities"]), reverse=True)
    if given["command"] == "attention":
        return filled(AttentionArguments, given)
    if given["command"] == "timeline":
        return filled(TimelineArguments, given)
    given["videos"] = dict(given["videos"])
    return filled(TransformerArguments, given)


def filled(kind: type[T], given: dict[str, Any]) -> T:
    """`kind` from what a parser gave, lists as tuples."""
    values = {option.name: given[option.name] for option in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _add_grids(parser: argparse.ArgumentParser) -> None:
    default = (VideoGrid(21, 30, 52), VideoGrid(21, 45, 80))
    parser.add_argument("--grids", nargs="+", type=_grid, default=default, help="TxHxW tokens")


def _add_run_flags(parser: argparse.ArgumentParser, repeat: int, warmup: int) -> None:
    parser.add_argument(
        "--densities", nargs="+", type=_density, default=[1.0, 0.7, 0.5, 0.3, 0.1], help="shares of key blocks kept"
    )
    parser.add_argument("--backends", nargs="+", default=["auto"], help="kernels, as --sparse-attn-backend takes them")
    parser.add_argument(
        "--remainders", nargs="+", choices=REMAINDERS, default=["drop"], help="of blocks that are not kept"
    )
    parser.add_argument("--meshes", nargs="+", type=pair, default=[], help="UxR (default: all of the ranks)")
    parser.add_argument("--heads", type=positive, default=40)
    parser.add_argument("--head-dim", type=positive, default=128)
    parser.add_argument("--block-size", type=pair, default=(128, 128), help="query x key tokens")
    parser.add_argument("--token-order", choices=TOKEN_ORDERS, default="hilbert")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--warmup", type=positive, default=warmup, help="calls before the timed ones")
    parser.add_argument("--repeat", type=positive, default=repeat, help="timed calls")
    parser.add_argument("--output", type=Path, help="file that JSON lines are added to")
    parser.add_argument("--time-limit-s", type=float, help="start no measurement after so many seconds")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="seconds that a rank waits for the others")


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage once a rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def positive(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0; give 1 or more")
    return int(text)


def _density(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"density {text} is not in (0, 1]; give a share such as 0.3")
    return value


def _sides(text: str, count: int, example: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not {count} whole numbers above 0; write it as {example}")
    return tuple(map(int, parts))


def pair(text: str) -> tuple[int, int]:
    """A flag's two whole numbers, as in 2x1."""
    first, second = _sides(text, 2, "2x1")
    return first, second


def _grid(text: str) -> VideoGrid:
    return VideoGrid(*_sides(text, 3, "21x30x52"))


def video(text: str) -> tuple[str, tuple[int, int, int]]:
    """A flag's video: its name, and its latent frames, rows and columns."""
    if text in VIDEOS:
        return text, VIDEOS[text]
    frames, height, width = _sides(text, 3, "480p, 720p or 21x60x104")
    if height % 2 or width % 2:
        raise argparse.ArgumentTypeError(f"{text}: patches are 2 x 2; give an even height and width")
    return text, (frames, height, width)
