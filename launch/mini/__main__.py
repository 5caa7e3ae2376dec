"""`python -m launch.mini train|sample|export|exchange|check`: docs/mini.md says in which order.

torchrun trains on several GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.mini import stages
from launch.mini.examine import examine, exchange
from launch.mini.export import assemble, export
from launch.mini.samples import GUIDANCE, STEPS, held_out_scenes, make_videos, save_strips
from launch.mini.sizes import SIZES, Sizes
from launch.mini.text import train_text
from launch.mini.training import Budget
from sp_sparse.generate.ranks import start_ranks

_MODEL = Path(__file__).with_name("model")
_USER_ERRORS = (ValueError, OSError, FloatingPointError)
# Compiling on one rank keeps the others waiting.
_TIMEOUT_S = 600.0
# Clips a step and rank, and learning rate.
_DEFAULTS = {
    "vae": (16, 1e-3),
    "decoder": (8, 5e-4),
    "text": (64, 1e-3),
    "joint": (48, 6e-4),
    "high": (48, 3e-4),
    "low": (48, 3e-4),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if `check` finds fewer captions followed than asked for; 2 for an error of the user's."""
    arguments = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        return int(arguments.run(arguments, SIZES[arguments.size], device) or 0)
    except _USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(arguments: argparse.Namespace, sizes: Sizes, _: torch.device) -> None:
    budget = Budget(arguments.seconds, arguments.steps)
    name = arguments.stage
    with start_ranks("auto", _TIMEOUT_S) as ranks:
        if name == "latents":
            stages.make_latents(sizes, arguments.folder, ranks, budget, arguments.clips)
            return
        batch, rate = _DEFAULTS[name]
        batch, rate = arguments.batch or batch, arguments.rate or rate
        if name == "decoder":
            stages.train_decoder(sizes, arguments.folder, ranks, budget, batch, rate)
        elif name == "text":
            encoder = arguments.exported and stages.component(arguments.exported, "text_encoder")
            train_text(sizes, arguments.folder, ranks, budget, batch, rate, encoder)
        elif name == "vae":
            stages.train_vae(sizes, arguments.folder, ranks, budget, batch, rate, arguments.exported)
        else:
            stages.train_transformer(name, sizes, arguments.folder, ranks, budget, batch, rate, arguments.exported)


def _sample(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    if not (arguments.folder / "joint.pt").exists():
        save_strips(stages.reconstructions(sizes, arguments.folder, device), arguments.out)
        print(f"{arguments.out}: clips, and below each what the VAE makes of it", flush=True)
        return
    captions = [caption for _, caption in held_out_scenes(arguments.count)]
    pipe = assemble(sizes, arguments.folder, device)
    save_strips(make_videos(pipe, sizes, captions, arguments.steps, arguments.guidance), arguments.out)
    print(f"{arguments.out}, from above:", *captions, sep="\n", flush=True)


def _export(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    size = export(sizes, arguments.folder, arguments.model)
    print(f"{arguments.model}: {size / 1e6:.1f} MB", flush=True)


def _check(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> int:
    from diffusers import WanPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe: Any = WanPipeline.from_pretrained(arguments.model, dtype={"default": dtype, "vae": torch.float32})
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    found = examine(
        pipe, sizes, arguments.count, arguments.batch, arguments.steps, arguments.guidance,
        arguments.out or arguments.model,
    )  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in found.items()), flush=True)
    return 0 if found["followed"] >= arguments.at_least else 1


def _exchange(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    for row in exchange(assemble(sizes, arguments.folder, device), sizes, arguments.count):
        print(" ".join(f"{name}={value:.5f}" for name, value in row.items()), flush=True)


def _captions(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    print(*(caption for _, caption in held_out_scenes(arguments.count)), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.mini", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        one.add_argument("--size", choices=tuple(SIZES), default="mini", help="micro is for trying the commands out")
        return one

    train = command("train", _train, "run one stage for so many seconds, from its checkpoint if it has one")
    train.add_argument("--stage", choices=stages.STAGES, required=True)
    train.add_argument("--folder", type=Path, required=True, help="of the checkpoints and the log")
    train.add_argument("--seconds", type=float, default=60.0)
    train.add_argument("--steps", type=int, help="instead of seconds")
    train.add_argument("--batch", type=int, help="clips a step and rank")
    train.add_argument("--rate", type=float, help="highest learning rate")
    train.add_argument("--clips", type=int, default=16384, help="of the stage latents")
    train.add_argument(
        "--exported", type=Path, help="an exported model whose weights a stage without checkpoint starts from"
    )

    def sampling(one: argparse.ArgumentParser, count: int) -> None:
        one.add_argument("--count", type=int, default=count, help="held-out captions")
        one.add_argument("--steps", type=int, default=STEPS, help="denoising steps")
        one.add_argument("--guidance", type=float, default=GUIDANCE)

    sample = command(
        "sample", _sample, "make videos from the checkpoints, as a picture; before stage joint, try the VAE"
    )
    sample.add_argument("--folder", type=Path, required=True)
    sample.add_argument("--out", type=Path, required=True, help=".png")
    sampling(sample, 6)

    write = command("export", _export, "write the model as a folder that WanPipeline.from_pretrained loads")
    write.add_argument("--folder", type=Path, required=True)
    write.add_argument("--model", type=Path, default=_MODEL)

    check = command("check", _check, "make videos of held-out captions and recognise color, shape and direction")
    check.add_argument("--model", type=Path, default=_MODEL)
    check.add_argument("--out", type=Path, help="folder of check.json and check.png; default: the model's")
    check.add_argument("--batch", type=int, default=10, help="videos made at a time")
    check.add_argument("--at-least", type=float, default=0.0, help="share followed below which the status is 1")
    sampling(check, 100)

    two = command(
        "exchange", _exchange, "show whether the checkpoints' model reads which words belong to which of two figures"
    )
    two.add_argument("--folder", type=Path, required=True)
    two.add_argument("--count", type=int, default=16, help="held-out clips with two figures")

    captions = command(
        "captions", _captions, "print held-out captions, one a line: the --prompts of sp_sparse.fidelity"
    )
    captions.add_argument("--count", type=int, default=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
