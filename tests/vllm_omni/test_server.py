"""A video asked of `vllm serve --omni` by OpenAI's client, sparse and dense, on meshes of CPUs; and how its log is read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from launch.benchmarks.omni_log import Told, check_every_layer, expert_layers, read_log
from launch.benchmarks.omni_request import ServedVideo

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "launch" / "mini" / "model"


@pytest.mark.timeout(900)  # four servers, each with two workers that import vllm
def test_a_served_video_is_sparse_in_every_layer_and_the_same_on_every_mesh(tmp_path: Path) -> None:
    made = {mesh: _request(tmp_path / mesh, mesh) for mesh in ("ulysses", "ring")}
    for mesh, report in made.items():
        assert report["layers"] == [6, 6]
        sparse, dense = report["sparse"], report["dense"]
        assert (sparse["ranks"], sparse["sparse_layers"], sparse["density"]) == (2, 6, [0.5]), mesh
        assert sparse["tokens"] == [[3, 12, 12]]
        assert (dense["ranks"], dense["sparse_layers"], dense["density"]) == (0, 0, [1.0]), mesh
    videos = {(mesh, kind): _frames(made[mesh][kind]["video"]) for mesh in made for kind in ("sparse", "dense")}
    assert videos["ulysses", "sparse"].shape == (9, 96, 96, 3)
    for kind in ("sparse", "dense"):
        assert np.abs(videos["ulysses", kind] - videos["ring", kind]).max() <= 1, "one level of 255, by rounding"
    assert np.abs(videos["ring", "sparse"] - videos["ring", "dense"]).mean() > 1


def _request(folder: Path, mesh: str) -> dict[str, Any]:
    settings = {"sparsity": 0.5, "block_size": 16, "backend": "reference"}
    video = ["--size", "96x96", "--num-frames", "9", "--num-inference-steps", "4", "--timeout-s", "180"]
    server = f"{sys.executable} {ROOT / 'tests' / 'vllm_omni' / 'cpu_server.py'}"
    flags = [f"--{mesh}-degree", "2", "--block-sparse", json.dumps(settings), "--server", server, *video]
    script = [sys.executable, str(ROOT / "launch" / "request_vllm_omni.py"), "--output", str(folder)]
    more = ["--", "--enforce-eager", "--dtype", "float32"]
    done = subprocess.run([*script, *flags, *more], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def _frames(path: str) -> NDArray[np.float64]:
    with Image.open(path) as file:
        return np.stack([np.asarray(frame.convert("RGB"), np.float64) for frame in ImageSequence.Iterator(file)])


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "launch" / "request_vllm_omni.py"), "--output", str(tmp_path)]
    refused = [*script, "--server", f"{sys.executable} -c 'raise SystemExit(\"no room\")'"]
    done = subprocess.run(refused, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the server ended with status 1:\nno room" in done.stderr
    done = subprocess.run([*script, "--server", "no-such-vllm"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert 'no-such-vllm is not there; pip install "sp-sparse[vllm]"' in done.stderr


def test_the_dense_command_differs_by_the_backend_alone() -> None:
    asked = ServedVideo(MINI, "a cat", "128x128", {}, ulysses=2, ring=4, block_sparse={"sparsity": 0.7}, more=("--x",))
    sparse, dense = asked.command(sparse=True, port=1), asked.command(sparse=False, port=1)
    attention = '{"per_role": {"self": {"backend": "SP_SPARSE", "block_sparse": {"sparsity": 0.7}}}}'
    where = sparse.index("--diffusion-attention-config")
    assert sparse[where + 1] == attention
    assert sparse[:where] + sparse[where + 2 :] == dense
    assert dense[:4] == ["vllm", "serve", str(MINI), "--omni"]
    assert dense[-5:] == ["--ulysses-degree", "2", "--ring-degree", "4", "--x"]


# Of two workers whose lines have run into one another.
LOG = """\
(DiffusionWorker_SP0 pid=7)   0%|   | 0/4(DiffusionWorker_SP1 pid=8) INFO [self_attention.py:1] \
SP_SPARSE rank 1 layer 0, video (3, 12, 13) under 2 x 2: sparse by kernel fa4, density 0.3, keys and values by ring
DEBUG [self_attention.py:1] \
SP_SPARSE rank 0 layer 1, video (3, 12, 13) under ring 4: dense by vllm-omni's ring (FLASH_ATTN), as its settings say
(DiffusionWorker_SP0 pid=7) INFO Resolved diffusion attention backend 'SP_SPARSE' for role='self'
INFO SP_SPARSE rank 0 layer 2, video (1, 2, 3) under one rank: sparse by kernel triton, density 0.25
"""


def test_a_log_is_read() -> None:
    grid = (3, 12, 13)
    assert read_log(LOG) == [
        Told(1, 0, grid, "2 x 2", "fa4", 0.3),
        Told(0, 1, grid, "ring 4", "vllm-omni's ring (FLASH_ATTN), as its settings say", 1.0),
        Told(0, 2, (1, 2, 3), "one rank", "triton", 0.25),
    ]


def test_layers_that_are_missing_or_dense_are_refused() -> None:
    layers = (2, 3)
    told = [
        Told(rank, layer, (1, 2, 3), "ring 2", "triton", 0.3)
        for rank in (0, 1)
        for depth in layers
        for layer in range(depth)
    ]
    check_every_layer(told, layers, ranks=2)
    for wrong, message in (
        (told[1:], "rank 0 told 1 times of layer 0, expected 2"),
        (told[:-1], "rank 1 told 0 times of layer 2, expected 1"),
        ([*told, replace(told[0], layer=3)], "rank 0 told 1 times of layer 3, expected 0"),
        ([*told, replace(told[0], density=1.0)], "1 of 11 lines tell of dense attention, the first of layer 0"),
        ([line for line in told if line.rank == 0], "1 ranks told of SP_SPARSE, expected 2"),
        ([], "0 ranks told of SP_SPARSE, expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_every_layer(wrong, layers, ranks=2)


def test_layers_are_those_of_the_model(tmp_path: Path) -> None:
    assert expert_layers(MINI) == (6, 6)
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 30}')
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert expert_layers(tmp_path) == (30,)
    with pytest.raises(ValueError, match="give the folder of a diffusers pipeline"):
        expert_layers(tmp_path / "none")
