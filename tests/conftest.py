"""One torch thread a process: forked ranks share two cores, and fork is only safe before a thread pool starts."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)

# Has an environment of its own: launch/test_vllm_omni.sh
collect_ignore = [] if find_spec("vllm_omni") else ["vllm_omni"]

# No deadline: nothing here asserts a time. Derandomised: a failure on one machine is a failure on every machine.
settings.register_profile("sp_sparse", deadline=None, max_examples=50, derandomize=True, database=None)
# For tests/mutations.py, which only asks whether a test fails, not on which smallest input.
settings.register_profile("no_shrink", settings.get_profile("sp_sparse"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("sp_sparse")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {gpus}"))
