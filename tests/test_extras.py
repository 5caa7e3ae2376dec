"""The core needs no framework, and a command whose packages are missing says in one line which extra brings them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sp_sparse

PACKAGE = Path(sp_sparse.__file__).parent
FRAMEWORKS = {
    *("diffusers", "transformers", "imageio", "PIL"),
    *("vllm", "vllm_omni"),
    *("fastapi", "uvicorn", "pydantic", "httpx"),
    *("torchmetrics", "matplotlib"),
    "torchao",
}

# Those that may know a framework.
APPLICATIONS = ("generate", "serve", "fidelity", "integrations")


def _run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=120)


def _without(package: str, command: str) -> str:
    """A program that runs a command as `python -m` does, where a package is not installed."""
    return f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module({command!r}, run_name='__main__')"


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("generate", "diffusers", "diffusers"),
        ("generate", "imageio_ffmpeg", "diffusers"),
        ("serve", "fastapi", "diffusers,serve"),
        ("serve", "diffusers", "diffusers,serve"),
        ("serve", "python_multipart", "diffusers,serve"),
        ("fidelity", "torchmetrics", "fidelity"),
        ("fidelity", "diffusers", "fidelity"),
    ],
)
def test_a_missing_extra_is_told_in_one_line(command: str, package: str, extra: str) -> None:
    flags = ["--prompts", "prompts.txt", "--output", "out"] if command == "fidelity" else []
    done = _run(_without(package, f"sp_sparse.{command}"), *flags)
    told = f'error: {command} needs {package}; pip install "sp-sparse[{extra}]" from a checkout or wheel\n'
    assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize(
    ("command", "package"), [("generate", "diffusers"), ("serve", "fastapi"), ("fidelity", "torchmetrics")]
)
def test_the_flags_are_told_without_the_extra(command: str, package: str) -> None:
    done = _run(_without(package, f"sp_sparse.{command}"), "--help")
    assert done.returncode == 0, done.stderr
    assert "--ulysses-degree" in done.stdout


def test_a_yaml_file_without_pyyaml(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("seed: 1\n")
    done = _run(_without("yaml", "sp_sparse.generate"), "--config", str(tmp_path / "job.yaml"))
    assert done.returncode == 2
    assert "job.yaml is read with pyyaml, which is not installed; pip install pyyaml, or write JSON" in done.stderr


def test_importing_the_package_is_light() -> None:
    done = _run(f"import sys, sp_sparse; print(*sorted({FRAMEWORKS!r} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("\n", "")


def test_only_applications_and_integrations_import_a_framework() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in APPLICATIONS:
            assert not _imported(path) & FRAMEWORKS, path


@pytest.mark.parametrize(
    ("below", "above"), [("generate", "serve"), ("integrations", "generate"), ("parallel", "serve")]
)
def test_nothing_imports_what_builds_on_it(below: str, above: str) -> None:
    for path in (PACKAGE / below).rglob("*.py"):
        assert f"sp_sparse.{above}" not in {".".join(name.split(".")[:2]) for name in _names(path)}, path


def _imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _names(path)}


def _names(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
