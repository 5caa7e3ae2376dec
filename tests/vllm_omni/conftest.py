"""vllm-omni is imported once, before ranks are forked, on a platform for CPUs."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tests.vllm_omni import cpu

cpu.install()
