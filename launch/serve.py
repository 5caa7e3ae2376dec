"""Serve videos over HTTP on one or several ranks: `python launch/serve.py`, `torchrun … launch/serve.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.ranks import leave  # noqa: E402
from launch.serving.command import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
