"""Run by test_server: `vllm serve --omni` on CPUs. vllm-omni starts its workers from this file, too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from launch.benchmarks.omni_server import main  # noqa: E402
from tests.vllm_omni import cpu  # noqa: E402

cpu.install(pipelines=True)


def _serve_on_cpu() -> None:
    """What a worker asks its platform for, and vllm's, beyond what a transformer needs."""
    import vllm.platforms
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    from vllm_omni.platforms import current_omni_platform

    answers: dict[str, Any] = {
        "get_device_count": 8,
        "get_current_memory_usage": 0.0,
        "max_memory_reserved": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "get_free_memory": 1 << 33,
        "get_device_total_memory": 1 << 33,
    }
    for platform in (type(vllm.platforms.current_platform), type(current_omni_platform)):
        for name, value in answers.items():
            setattr(platform, name, staticmethod(lambda *_, value=value, **__: value))
    # Outputs leave a worker by a stream of its device.
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")
    # Two steps at 1024 x 1024, which take a CPU minutes.
    DiffusionEngine.run_startup_warmup = lambda self: None


_serve_on_cpu()

if __name__ == "__main__":
    main()
