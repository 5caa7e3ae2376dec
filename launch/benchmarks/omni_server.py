"""`vllm serve … --omni`, with stand-ins for the parts of its installation that are missing (`omni_stand_ins.py`).

vllm-omni starts its workers anew, from this file: what stands below the imports is done in each of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.benchmarks.omni_model import do_without_compiled_parts  # noqa: E402
from launch.benchmarks.omni_stand_ins import stand_in, videos_without_av  # noqa: E402

MISSING = stand_in()
do_without_compiled_parts(pipelines=True)


def main() -> None:
    from vllm_omni.entrypoints.cli.main import main as command

    if "av" in MISSING:
        videos_without_av()
    command()


if __name__ == "__main__":
    main()
