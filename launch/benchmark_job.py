"""A whole job of `generate` as results: its seconds and its peaks of memory by stage, a JSON line each.

`[torchrun …] launch/benchmark_job.py --rows rows.jsonl [--share-gb 48] FLAGS…`, the FLAGS being those of `generate`. A job
that fails ends with its own error and status, and adds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from sp_sparse.generate.__main__ import main as generate  # noqa: E402
from sp_sparse.generate.arguments import RANDOM_A14B, RANDOM_LAYERS, parse_arguments  # noqa: E402
from sp_sparse.generate.console import refuse_arguments  # noqa: E402
from sp_sparse.generate.ranks import leave, rank_from_environment  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job, then append its lines; the job's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--share-gb", type=float, help="let torch take no more than so many 10^9 bytes of each GPU")
    own, flags = parser.parse_known_args(argv)
    try:
        report_path = parse_arguments(flags).report_path()
    except (ValueError, OSError) as error:
        return refuse_arguments(error)
    if own.share_gb is not None:
        _limit(own.share_gb)
    status = generate(flags)
    if status == 0 and rank_from_environment() == 0:
        report = json.loads(report_path.read_text(encoding="utf-8"))
        with own.rows.open("a", encoding="utf-8") as file:
            for row in rows(report, own.share_gb):
                file.write(json.dumps(row) + "\n")
    return status


def rows(report: dict[str, Any], share_gb: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a report says of time and of memory: seconds of all videos of the job, peaks of the rank that needs most."""
    arguments, made = report["arguments"], report["videos"][0]["made"]
    sparse = arguments["sparse"]
    layers = arguments["layers"] or (RANDOM_LAYERS if arguments["model"] == RANDOM_A14B else None)
    common = {
        "gpus": report["ranks"],
        "ulysses": report["mesh"]["ulysses_degree"],
        "ring": report["mesh"]["ring_degree"],
        "cfg": report["mesh"]["cfg_degree"],
        "model": arguments["model"],
        "layers": layers,
        "video": [made["num_frames"], made["height"], made["width"]],
        "videos": len(report["videos"]),
        "num_inference_steps": made["num_inference_steps"],
        "guidance_scale": made["guidance_scale"],
        "density_asked": 1.0 if sparse["backend"] == "none" else sparse["topk"],
        "density": 1.0 if report["attention"] is None else round(report["attention"]["mean_density"], 4),
        "backend": sparse["backend"],
        "preset": arguments["sparse_attn_preset"],
        "compiled": arguments["compile"],
        "options": report["memory"],
        "share_gb": share_gb,
        "seconds_per_step": report["seconds_per_step"],
    }
    made_on = {name: report[name] for name in ("hardware", "versions", "date")}
    return (
        {"what": "job", **common, "seconds": report["seconds"], **made_on},
        {"what": "memory", **common, "peak_memory": report["peak_memory"], **made_on},
    )


def _limit(share_gb: float) -> None:
    device = int(os.environ.get("LOCAL_RANK", "0"))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share_gb * 1e9 / total), device)


if __name__ == "__main__":
    leave(main())
