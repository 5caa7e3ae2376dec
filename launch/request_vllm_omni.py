"""Ask a server of vllm-omni for a video with SP_SPARSE, and another for the same one dense; --help lists the flags.

Starts `vllm serve MODEL --omni` twice, asks each with OpenAI's client, keeps both videos, and reads from the log that
SP_SPARSE ran on every self-attention of every rank, and how dense. Needs `pip install "sp-sparse[vllm]"` and a GPU a rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.arguments import positive  # noqa: E402
from launch.benchmarks.omni_request import ServedVideo, serve_both  # noqa: E402
from sp_sparse.generate.mini import MINI, mini_folder  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Serve and ask; 0, or 1 if a server failed or the log does not tell what it should."""
    arguments = _parse(argv)
    try:
        model = mini_folder() if arguments.model == MINI else Path(arguments.model)
        video = {
            "num_frames": arguments.num_frames,
            "num_inference_steps": arguments.num_inference_steps,
            "guidance_scale": arguments.guidance_scale,
            "flow_shift": arguments.flow_shift,
            "fps": arguments.fps,
            "seed": arguments.seed,
        }
        asked = ServedVideo(
            model=model,
            prompt=arguments.prompt,
            size=arguments.size,
            video=video,
            ulysses=arguments.ulysses_degree,
            ring=arguments.ring_degree,
            block_sparse=arguments.block_sparse,
            server=arguments.server,
            more=tuple(arguments.more),
            timeout_s=arguments.timeout_s,
        )
        report = serve_both(asked, arguments.output)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINI, help="folder of a Wan pipeline of diffusers; mini is the checkout's")
    parser.add_argument("--output", type=Path, required=True, help="folder for videos, logs and report.json")
    parser.add_argument("--ulysses-degree", type=positive, default=1)
    parser.add_argument("--ring-degree", type=positive, default=1)
    parser.add_argument(
        "--block-sparse",
        type=_object,
        default={"sparsity": 0.7},
        help='settings of SP_SPARSE, all layers and steps alike; default {"sparsity": 0.7}',
    )
    parser.add_argument("--prompt", default="A red circle moves to the left over dark blue stripes.")
    parser.add_argument("--size", default="128x128", help="pixels; the defaults are what mini was trained for")
    parser.add_argument("--num-frames", type=positive, default=49)
    parser.add_argument("--num-inference-steps", type=positive, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--flow-shift", type=float, default=3.0)
    parser.add_argument("--fps", type=positive, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for a server to start, and for a video")
    parser.add_argument("--server", default="vllm", help="command that stands for vllm")
    parser.add_argument("more", nargs="*", help="after --: further flags of vllm serve, for both servers")
    return parser.parse_args(argv)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object; give one such as {{"sparsity": 0.7}}')
    return value


if __name__ == "__main__":
    sys.exit(main())
