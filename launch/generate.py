"""Generate videos with Wan 2.2 on one or several ranks: `python launch/generate.py`, `torchrun … launch/generate.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.application import main  # noqa: E402
from launch.ranks import leave  # noqa: E402

if __name__ == "__main__":
    leave(main())
