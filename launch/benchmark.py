"""Measure on one or several GPUs: `python launch/benchmark.py …`, `torchrun … launch/benchmark.py …`; --help lists what."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.command import main  # noqa: E402
from sp_sparse.generate.ranks import leave  # noqa: E402

if __name__ == "__main__":
    leave(main())
