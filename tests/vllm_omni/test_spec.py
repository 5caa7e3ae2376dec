"""Our options in `block_sparse`: read where vllm-omni reads its configuration, and carried to a worker's layers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_omni.diffusion import data

from sp_sparse.integrations.vllm_omni import register
from sp_sparse.integrations.vllm_omni.settings import Settings
from tests.oracle import relative_error
from tests.vllm_omni.wan import Job, Mesh, run

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"backend": "reference", "block_size": "16x16", "remainder": "linear", "keep_first_frame": True}
OWN = {"sparsity": 0.7, "start_step": 10, "skip_layers": "0-1"}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def _spec(block_sparse: Any, backend: str = "SP_SPARSE") -> data.AttentionSpec:
    return data.parse_attention_config(
        {"per_role": {"self": {"backend": backend, "block_sparse": block_sparse}}}
    ).per_role["self"]


@pytest.mark.parametrize("backend", ["SP_SPARSE", "sp_sparse"])
def test_options_reach_the_implementation(backend: str) -> None:
    spec = _spec({**OWN, **OPTIONS}, backend)
    assert isinstance(spec, data.AttentionSpec)
    settings = Settings.read(spec.backend_kwargs(), None)
    assert settings == Settings.read({**OWN, "skip_layers": [0, 1]}, {"sp_sparse": OPTIONS})
    assert settings != Settings.read({**OWN, "skip_layers": [0, 1]}, None)


def test_a_preset_has_its_own_density_unless_one_is_given() -> None:
    """vllm-omni fills in a sparsity of 0.8, which must not be taken for the user's."""
    topk = [
        Settings.read(_spec({"preset": "fast", "num_steps": 40, **given}).backend_kwargs(), None).config.topk
        for given in ({}, {"sparsity": 0.8})
    ]
    assert topk == [0.1, 0.2]
    additional = {"sp_sparse": {"preset": "fast", "num_steps": 40}}
    assert Settings.read(_spec(None).backend_kwargs(), additional).config.topk == 0.1
    typed = _spec(data.BlockSparseSpec(sparsity=0.6))
    assert Settings.read(typed.backend_kwargs(), additional).config.topk == 0.4, (
        "a typed specification gives a sparsity"
    )


@pytest.mark.parametrize(
    ("block_sparse", "message"),
    [
        ({"remaindr": "mean"}, "unknown options remaindr in block_sparse; known are backend, .*, remainder, "),
        ({"topk": 0.3}, "topk is not read from block_sparse; use block_sparse.sparsity"),
        ({"options": {}}, "unknown options options"),
        ({"sparsity": 2.0, "remainder": "mean"}, "block_sparse.sparsity must be finite and in"),
    ],
)
def test_refused_where_the_configuration_is_read(block_sparse: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _spec(block_sparse)


def test_other_backends_do_not_take_them() -> None:
    with pytest.raises(TypeError, match="remainder"):
        _spec({"remainder": "mean"}, "RAINFUSION_ATTN")
    spec = _spec({"sparsity": 0.7}, "RAINFUSION_ATTN")
    assert (type(spec), type(spec.block_sparse)) == (data.AttentionSpec, data.BlockSparseSpec)
    with pytest.raises(ValueError, match="block_sparse is only supported by"):
        _spec({"sparsity": 0.7}, "FLASH_ATTN")


def test_copies_hold_the_options() -> None:
    config = data.AttentionConfig(per_role={"self": {"backend": "SP_SPARSE", "block_sparse": {**OWN, **OPTIONS}}})
    wanted = config.per_role["self"].backend_kwargs()
    assert wanted is not None
    assert OPTIONS.items() <= wanted.items()
    again = dataclasses.replace(config.per_role["self"])
    for spec in (again, copy.deepcopy(config).per_role["self"], data.build_attention_config(config).per_role["self"]):
        assert spec.backend_kwargs() == wanted


def test_a_worker_reads_them_though_it_has_not_registered_yet() -> None:
    spec = _spec({**OWN, **OPTIONS})
    script = (
        "import pickle, sys; from tests.vllm_omni import cpu; cpu.install();"
        "spec = pickle.loads(sys.stdin.buffer.read()); sys.stdout.buffer.write(pickle.dumps(spec.backend_kwargs()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, input=pickle.dumps(spec), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(done.stdout) == spec.backend_kwargs()


def test_a_model_runs_as_with_the_other_flag() -> None:
    mesh, grid, options = Mesh(ulysses=2, ring=2), (4, 6, 9), {"remainder": "linear"}
    here = run(mesh, Job(grid, {"sparsity": 0.6, "block_size": 16, **options}, {}))[0]
    there = run(mesh, Job(grid, {"sparsity": 0.6}, {"block_size": 16, **options}))[0]
    dropped = run(mesh, Job(grid, {"sparsity": 0.6}, {"block_size": 16}))[0]
    assert here.sparse == 2
    assert here.output.equal(there.output)
    assert relative_error(here.output, dropped.output) > 1e-3
