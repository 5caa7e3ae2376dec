"""Generate videos from a checkout that need not be installed: `sp_sparse.generate`, as `python -m` runs it."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `sp_sparse` lies above it
runpy.run_module("sp_sparse.generate", run_name="__main__")
