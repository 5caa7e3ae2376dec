"""LPIPS of `fidelity`: the real metric over an AlexNet of random weights, from a stand-in for torchvision."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")
pytest.importorskip("diffusers")  # asks for torchvision when it is imported

from torchmetrics.functional.image import lpips as functional
from torchmetrics.image import lpip
from transformers.utils import is_torchvision_available

from sp_sparse.fidelity.__main__ import main
from sp_sparse.fidelity.metrics import VideoMetrics, as_float
from tests.ranks import run_ranks

CPU = torch.device("cpu")
# As torchvision names it.
FILE = "alexnet-owt-7be5be79.pth"
DENSITIES = ["--densities", "0.2,0.5", "--masks", "false"]


def _alexnet() -> nn.Module:
    """The layers of torchvision's, of which LPIPS reads the first twelve."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    model = nn.Module()
    model.features = features
    return model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch's checkpoints, empty; torchvision is there."""
    is_torchvision_available()  # which transformers remembers: not the stand-in
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder.parent))

    def alexnet(weights: Any) -> nn.Module:
        model = _alexnet()
        model.load_state_dict(torch.load(folder / Path(weights.url).name, weights_only=True))
        return model

    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    torchvision.__spec__, torchvision.models = ModuleSpec("torchvision", None), models  # type: ignore[attr-defined]
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://example.org/models/{FILE}"))
    models.alexnet, models.AlexNet_Weights = alexnet, weights  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in (lpip, functional):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    return folder


@pytest.fixture
def weights(hub: Path) -> Path:
    """AlexNet's weights are there, too."""
    torch.manual_seed(0)
    torch.save(_alexnet().state_dict(), hub / FILE)
    return hub / FILE


def _video(seed: int, side: int = 40, frames: int = 5) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side + 8, 3), dtype=np.uint8)


def _of_each_frame(video: Any, other: Any) -> list[float]:
    net = functional._NoTrainLpips(net="alex")
    pixels = [2 * as_float(x).permute(0, 3, 1, 2) - 1 for x in (video, other)]
    return [float(net(one[None], two[None])) for one, two in zip(*pixels, strict=True)]


def test_it_is_the_mean_over_the_frames(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _video(0), _video(1)
    other[:2] = one[:2]
    metrics = VideoMetrics(CPU, 40)
    assert metrics.without_lpips is None
    expected = _of_each_frame(one, other)
    assert expected[0] == 0 < min(expected[2:])
    assert metrics.compare(one, other)["lpips"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    # In pieces of 2, 2 and 1 frames, and nothing is left of the video before.
    monkeypatch.setattr("sp_sparse.fidelity.metrics._BUDGET", 2 * one[0].size)
    assert metrics.compare(one, other)["lpips"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert metrics.compare(one, one)["lpips"] == 0


def test_without_its_weights(hub: Path) -> None:
    metrics = VideoMetrics(CPU, 40)
    assert metrics.without_lpips == f"AlexNet's weights are not at {hub / FILE}"
    found = metrics.compare(_video(0), _video(1))
    assert found["lpips"] is None
    assert found["psnr"] is not None
    assert not list(hub.iterdir()), "nothing is downloaded"


def test_without_torchvision(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sp_sparse.fidelity.metrics.find_spec", lambda name: None)
    metrics = VideoMetrics(CPU, 40)
    assert metrics.without_lpips == "torchvision is not installed"
    assert metrics.compare(_video(0), _video(1))["lpips"] is None


def test_the_smallest_side(weights: Path) -> None:
    found = VideoMetrics(CPU, 31).compare(_video(0, 31), _video(1, 31))["lpips"]
    assert found is not None
    assert found > 0
    metrics = VideoMetrics(CPU, 30)
    assert metrics.without_lpips == "a side of 30 pixels is below the 31 that AlexNet needs"
    assert metrics.compare(_video(0, 30), _video(1, 30))["lpips"] is None


def test_weights_that_are_broken(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{weights} cannot be read \(.*\); remove the file to leave LPIPS out"):
        VideoMetrics(CPU, 40)


def _flags(folder: Path, *more: str, side: int = 64) -> list[str]:
    (folder / "prompts.txt").write_text("a red ball\na dog\n")
    size = ["--model=tiny", f"--height={side}", f"--width={side}", "--num-frames=5", "--num-inference-steps=2"]
    paths = ["--prompts", str(folder / "prompts.txt"), "--output", str(folder / "out")]
    return [*paths, *size, "--block-sizes=8", "--sparse-attn-backend", "reference", *DENSITIES, *more]


def test_a_measurement_has_it_in_lines_and_tables(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_flags(tmp_path)) == 0
    assert "LPIPS is left out" not in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "fidelity.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"dense", "floor", "sparse"}
    for line in lines:
        assert (line["lpips"] is None) == (line["kind"] == "dense")
        assert line["kind"] != "sparse" or line["lpips"] > 0
    table = (tmp_path / "out" / "fidelity.md").read_text()
    assert "| SSIM | Δ SSIM | LPIPS | Δ LPIPS |" in table


def test_a_measurement_says_that_it_has_none(tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_flags(tmp_path)) == 0
    assert capsys.readouterr().err.count(f"LPIPS is left out: AlexNet's weights are not at {hub / FILE}\n") == 1
    assert "LPIPS" not in (tmp_path / "out" / "fidelity.md").read_text()


def _rank_is_refused(rank: int, flags: list[str], weights: str) -> None:
    with redirect_stderr(StringIO()) as told:
        assert main(flags) == 2
    errors = [line for line in told.getvalue().splitlines() if "error:" in line]
    assert len(errors) == (rank == 0)
    assert all(f"AlexNet's weights at {weights} cannot be read" in error for error in errors)


def test_broken_weights_end_all_ranks(tmp_path: Path, weights: Path) -> None:
    weights.write_bytes(b"")
    flags = _flags(tmp_path, "--ring-degree", "2", "--timeout-s", "20")
    run_ranks(2, _rank_is_refused, flags, str(weights), timeout_s=20.0)
