"""The plug-in as vllm-omni loads it: by entry point, in the order in which its command line does things."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from vllm_omni.diffusion import data
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.diffusion.attention.selector import get_attn_backend_for_role
from vllm_omni.plugins import OMNI_DEFAULT_PLUGINS_GROUP, load_omni_general_plugins, load_omni_plugins_by_group

from sp_sparse.integrations.vllm_omni import registration, versions
from sp_sparse.integrations.vllm_omni.backend import SparseAttentionBackend

ROOT = Path(__file__).resolve().parents[2]


def test_loaded_by_vllm_omni() -> None:
    assert load_omni_plugins_by_group(OMNI_DEFAULT_PLUGINS_GROUP)["sp_sparse"] is registration.register
    load_omni_general_plugins()
    assert DiffusionAttentionBackendEnum["SP_SPARSE"].get_class() is SparseAttentionBackend
    config = data.parse_attention_config({"per_role": {"self": {"backend": "SP_SPARSE"}}})
    backend, spec = get_attn_backend_for_role("self", 128, config)
    assert backend is SparseAttentionBackend
    assert spec is not None
    assert spec.backend_kwargs() == {"start_step": 0, "end_step": 0, "precision": "bf16"}, "no sparsity was given"
    other, _ = get_attn_backend_for_role("cross", 128, config)
    assert other is not SparseAttentionBackend


def test_nothing_is_imported_until_it_is_chosen() -> None:
    script = "import sys, sp_sparse.integrations.vllm_omni as plugin; print({m.partition('.')[0] for m in sys.modules})"
    imported = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "'sp_sparse'" in imported
    assert not any(f"'{name}'" in imported for name in ("vllm", "vllm_omni", "aenum", "diffusers"))


def test_registering_twice_changes_nothing() -> None:
    registration.register()
    members, backends = list(DiffusionAttentionBackendEnum), data.BLOCK_SPARSE_BACKENDS
    registration.register()
    assert list(DiffusionAttentionBackendEnum) == members
    assert backends == data.BLOCK_SPARSE_BACKENDS
    member = DiffusionAttentionBackendEnum["SP_SPARSE"]
    assert pickle.loads(pickle.dumps(member)) is member


def test_an_unknown_version_is_no_error_until_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.40.0")
    monkeypatch.delattr(data, "BLOCK_SPARSE_BACKENDS")
    with caplog.at_level(logging.WARNING, "sp_sparse"):
        registration.register()
    assert "SP_SPARSE is not registered" in caplog.text
    assert "knows vllm-omni 0.30.*" in caplog.text


def test_command_line() -> None:
    """vllm-omni's own parser and configuration, in a process of its own that has not seen the plug-in before."""
    assert {p.name for p in entry_points(group="vllm.general_plugins")} >= {"sp_sparse"}
    script = ROOT / "tests" / "vllm_omni" / "command_line.py"
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "command line: ok" in done.stdout
