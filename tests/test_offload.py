"""`--offload` on a pretended device: the same videos on every mesh, each move once, and what happens where one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sp_sparse.generate.__main__ import main
from sp_sparse.generate.random_models import tiny_text_to_video
from tests.offload_device import pretended_device
from tests.ranks import run_ranks

SMALL = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-inference-steps", "4"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-block-size", "8", "--sparse-attn-topk", "0.5"]
KINDS = ("idle", "layers")


def _latents(folder: Path, name: str, *flags: str) -> Tensor:
    """Of this process's job, which may be one of several ranks."""
    tensor = folder / f"{name}.pt"
    places = ["--output", str(folder / f"{name}.mp4"), "--output-latents", str(tensor)]
    assert main([*SMALL, *SPARSE, *flags, *places]) == 0
    latents: Tensor = torch.load(tensor, weights_only=True)
    return latents


def _report(folder: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return report


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v", "tiny-ti2v"])
def test_the_same_video_on_one_rank(model: str, tmp_path: Path) -> None:
    size = ["--height", "128", "--width", "128"] if model == "tiny-ti2v" else []
    flags = ["--model", model, *size]
    plain = _latents(tmp_path, "plain", *flags)
    experts = ("transformer",) if model == "tiny-ti2v" else ("transformer", "transformer_2")
    with pretended_device() as came:
        assert torch.equal(_latents(tmp_path, "idle", *flags, "--offload", "idle"), plain)
        assert came == {"text_encoder": 1, **dict.fromkeys(experts, 1)}
        came.clear()
        assert torch.equal(_latents(tmp_path, "layers", *flags, "--offload", "layers"), plain)
        # Two blocks each, at both branches of four steps; of the text encoder at two prompts.
        assert came == {"block": 2 * 2 * 4 + 2 * 2}
    memory = {name: _report(tmp_path, name)["memory"] for name in ("plain", *KINDS)}
    assert memory["idle"]["comings"] == {"text_encoder": 1, **dict.fromkeys(experts, 1)}
    assert [(memory[name]["offload"], memory[name]["comings"] is None) for name in ("plain", "layers")] == [
        ("none", True),
        ("layers", True),
    ]


def _rank_compares(rank: int, folder: str, flags: list[str]) -> None:
    """Each kind equals `plain`, which one rank has made; two videos, between which the experts change back."""
    wanted = [torch.load(Path(folder, f"plain_{number}.pt"), weights_only=True) for number in range(2)]
    for kind in KINDS:
        with pretended_device() as came:
            name = f"{kind}_{'_'.join(flags)}"
            places = ["--output", f"{folder}/{name}.mp4", "--output-latents", f"{folder}/{name}.pt"]
            assert main([*SMALL, *SPARSE, "--videos-per-prompt", "2", *flags, "--offload", kind, *places]) == 0
        if kind == "idle":
            assert came == {"text_encoder": 1, "transformer": 2, "transformer_2": 2}, "on each rank"
        else:
            # With guidance on two halves each of them makes one branch.
            branches = 1 if "--cfg-parallel-degree" in flags else 2
            assert came == {"block": 2 * 2 * 4 * branches + 2 * 2}
        for number, latents in enumerate(wanted):
            if rank == 0:
                got = torch.load(Path(folder, f"{name}_{number}.pt"), weights_only=True)
                torch.testing.assert_close(got, latents, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two videos without offloading, on one rank."""
    folder = tmp_path_factory.mktemp("plain")
    places = ["--output", str(folder / "plain.mp4"), "--output-latents", str(folder / "plain.pt")]
    assert main([*SMALL, *SPARSE, "--videos-per-prompt", "2", *places]) == 0
    return folder


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, ["--ulysses-degree", "2"]),
        (2, ["--ring-degree", "2"]),
        (4, ["--ulysses-degree", "2", "--ring-degree", "2"]),
        (2, ["--cfg-parallel-degree", "2"]),
    ],
    ids=["ulysses", "ring", "hybrid", "halves"],
)
def test_the_same_videos_on_every_mesh(world: int, flags: list[str], plain: Path) -> None:
    run_ranks(world, _rank_compares, str(plain), flags)
