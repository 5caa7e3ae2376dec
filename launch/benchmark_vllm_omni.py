"""Check and time SP_SPARSE within vllm-omni's own Wan transformer: `torchrun … launch/benchmark_vllm_omni.py`; --help lists.

Against one GPU it checks every mesh of the ranks; against vllm-omni's dense attention it times each, on the same mesh.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `launch` lies above it

from launch.benchmarks.omni_model import do_without_compiled_parts  # noqa: E402

do_without_compiled_parts()

from launch.benchmarks.omni import main  # noqa: E402
from sp_sparse.generate.ranks import leave  # noqa: E402

if __name__ == "__main__":
    leave(main())
