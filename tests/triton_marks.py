"""How tests that need triton or a GPU are marked, and how those under Triton's interpreter are run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def on_gpu(test):  # type: ignore[no-untyped-def]
    """Mark a test that launches a compiled kernel."""
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    return pytest.mark.gpu(needs_triton(test))


def run_interpreted(file: str) -> None:
    """Run a file of tests in a process of its own, as TRITON_INTERPRET counts when triton is imported."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rs", str(here / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, check=False)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(done.stdout.strip()[-500:])
    assert done.returncode == 0, done.stdout + done.stderr


def skip_without_interpreter() -> None:
    """Skip the module that calls this if Triton's interpreter does not run: by the attention kernel, whatever is tested."""
    from sp_sparse.kernels.triton import TritonKernel
    from tests.triton_oracle import random_problem

    try:
        tiny = random_problem((64, 64), 64, torch.float16, "cpu", (10, 10), batch=1, heads=1)
        TritonKernel()(tiny.query, tiny.key, tiny.value, tiny.mask, tiny.scale)
    except Exception as error:
        pytest.skip(f"Triton's interpreter does not run here: {error!r}", allow_module_level=True)
