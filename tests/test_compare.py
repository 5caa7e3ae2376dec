"""`launch/compare.py` on reports and tensors made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.compare import main


def _job(folder: Path, name: str, frames: Tensor, latents: Tensor) -> str:
    files = {"output_frames": folder / f"{name}_frames.pt", "output_latents": folder / f"{name}_latents.pt"}
    torch.save(frames, files["output_frames"])
    torch.save(latents, files["output_latents"])
    report = {
        "mesh": {"ulysses_degree": 1, "ring_degree": 1, "cfg_degree": 1},
        "ranks": 1,
        "attention": None,
        "seconds_per_step": 0.1,
        "videos": [{**{key: str(path) for key, path in files.items()}, "made": {"fps": 8}}],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report))
    return str(path)


@pytest.fixture
def frames() -> Tensor:
    return torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("off", "status"), [(0.0, 0), (5e-5, 0), (2e-4, 1), (float("nan"), 1)])
def test_jobs_that_differ_by_more_than_the_tolerance_fail(
    tmp_path: Path, frames: Tensor, off: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = torch.zeros(4)
    other = latents.clone()
    other[3] += off
    reports = [_job(tmp_path, "a", frames, latents), _job(tmp_path, "b", frames, other)]
    assert main(["--tolerance", "1e-4", *reports]) == status
    assert ("differ by more than 0.0001" in capsys.readouterr().err) == bool(status)


def test_videos_are_put_side_by_side(tmp_path: Path, frames: Tensor) -> None:
    import imageio.v3 as imageio
    import numpy as np

    left, right = frames * 0, frames * 0 + 0.5
    reports = [_job(tmp_path, "a", left, torch.zeros(1)), _job(tmp_path, "b", right, torch.ones(1))]
    assert main(["--side-by-side", str(tmp_path / "both.mp4"), *reports]) == 0
    shown = imageio.imread(tmp_path / "both.mp4")
    assert shown.shape == (5, 32, 48 + 16 + 48, 3)
    # Away from the edges, where the codec blurs.
    means = [np.mean(shown[2][:, part]) for part in (slice(4, 40), slice(54, 58), slice(68, 108))]
    assert means == pytest.approx([0, 255, 128], abs=12)
