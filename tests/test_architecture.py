"""Who may import whom within sp_sparse, as docs/architecture.md draws it. Imports are read, nothing is run.

In-function imports count as others do; those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "sp_sparse"
ROOT = Path(__file__).resolve().parent.parent

BASE = "base"
SIBLINGS = ("selection", "kernels", "parallel")

# The layer of every module or package directly under sp_sparse ("" is its __init__), and how high it stands.
LAYERS = {
    **dict.fromkeys(
        ("mask", "config", "schedule", "video", "recorder", "flags", "plugins", "device", "recent", "triton_split"),
        BASE,
    ),
    **{name: name for name in (*SIBLINGS, "remainder", "attention", "integrations", "generate", "serve", "fidelity")},
    "": "package",
}
HEIGHTS = {
    BASE: 0,
    **dict.fromkeys(SIBLINGS, 1),
    "remainder": 2,
    "attention": 3,
    "package": 4,
    "integrations": 5,
    "generate": 6,
    "serve": 7,
    "fidelity": 7,
}

# Packages beside the standard library; a layer that is not named here imports what it likes.
THIRD_PARTY = {
    BASE: {"torch", "numpy", "triton", "yaml"},
    "selection": {"torch", "numpy", "triton"},
    "kernels": {"torch", "numpy", "triton", "flash_attn", "flashinfer"},
    "parallel": {"torch", "numpy", "triton", "yunchang"},
    "remainder": {"torch", "triton"},
    "attention": {"torch"},
    "package": set(),
    "integrations": {"torch", "diffusers", "vllm", "vllm_omni", "aenum"},
}


@dataclass(frozen=True)
class Import:
    """`module` names `target` in `line`; `target` is a module of the package where there is one, else as it is written."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read(package: Path) -> list[Import]:
    """Every import of every module of a package, in order."""
    files = {_module_name(file, package): file for file in sorted(package.rglob("*.py"))}
    found = []
    for name, file in files.items():
        for target, source, line in _named(ast.parse(file.read_text()), name, file.name == "__init__.py"):
            found.append(Import(name, source if target not in files and source in files else target, line))
    return list(dict.fromkeys(found))


def _module_name(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _named(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str, int]]:
    """What the code under `node` imports, and what it reaches as `torch.distributed`: a target, `a.b` of a
    `from a.b import c` (a.b.c is a module, or c a name in a.b), and the line."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for otherwise in node.orelse:
            yield from _named(otherwise, module, is_package)
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, "", node.lineno
    elif isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package]
            source = ".".join((*above, source) if source else above)
        for alias in node.names:
            yield f"{source}.{alias.name}", source, node.lineno
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        yield "torch.distributed", "", node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _named(child, module, is_package)


def layer_of(module: str) -> str | None:
    """The layer of a module of the package, None where it has none."""
    return LAYERS.get(module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0])


def _is_ours(target: str) -> bool:
    return target.partition(".")[0] == PACKAGE


def upwards(imports: list[Import]) -> Iterator[str]:
    """A layer imports itself and those below it. Siblings are of one height, so none imports another."""
    for found in imports:
        layer = layer_of(found.module)
        if layer is None:
            yield f"{found.module} has no layer: give it one in LAYERS, and in docs/architecture.md"
        elif _is_ours(found.target):
            target = layer_of(found.target)
            if target is None or (target != layer and HEIGHTS[target] >= HEIGHTS[layer]):
                yield f"{found} ({layer} may not import {target})"


def third_party(imports: list[Import]) -> Iterator[str]:
    """Frameworks are known by integrations/ and what stands above it alone; nothing in the wheel needs launch/ or tests/."""
    for found in imports:
        name = found.target.partition(".")[0]
        allowed = THIRD_PARTY.get(layer_of(found.module) or "")
        if name in ("launch", "tests"):
            yield str(found)
        elif allowed is not None and name not in {*allowed, *sys.stdlib_module_names, PACKAGE}:
            yield f"{found} (allowed are {', '.join(sorted(allowed)) or 'none'})"


def ranks(imports: list[Import]) -> Iterator[str]:
    """Selection and kernels know no ranks."""
    for found in imports:
        named = f"{found.target}.".startswith("torch.distributed.")
        if named and layer_of(found.module) in ("selection", "kernels"):
            yield str(found)


def video(imports: list[Import]) -> Iterator[str]:
    """How shards meet does not depend on what the tokens are."""
    for found in imports:
        if layer_of(found.module) == "parallel" and found.target == f"{PACKAGE}.video":
            yield str(found)


def circles(imports: list[Import]) -> Iterator[str]:
    """No module imports itself, by whatever way round. That a package's __init__ runs before its modules does not count."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if _is_ours(found.target):
            edges.setdefault(found.module, set()).add(found.target)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> Iterator[str]:
        if module in path:
            yield " -> ".join((*path[path.index(module) :], module))
        elif module not in finished:
            for target in sorted(edges.get(module, ())):
                yield from visit(target, (*path, module))
            finished.add(module)

    for module in sorted(edges):
        yield from visit(module, ())


Rule = Callable[[list[Import]], Iterator[str]]
RULES: tuple[Rule, ...] = (upwards, third_party, ranks, video, circles)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_imports(rule: Rule) -> None:
    broken = list(rule(read(ROOT / PACKAGE)))
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


# A tree that keeps every rule, and files each of which breaks one.
GOOD = {
    "__init__.py": "from sp_sparse.attention import layer",
    "mask.py": "import torch\n\ndef f():\n    from sp_sparse.triton_split import split",
    "triton_split.py": "import triton.language as tl",
    "video.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sp_sparse import attention",
    "recorder.py": "import torch.distributed as dist",
    "selection/__init__.py": "",
    "selection/topk.py": "from sp_sparse import mask\nfrom sp_sparse.video import VideoGrid\nfrom . import rows",
    "selection/rows.py": '"""Knows no torch.distributed."""\nimport numpy.typing',
    "kernels/__init__.py": "",
    "kernels/base.py": "from sp_sparse.mask import BlockMask",
    "parallel/__init__.py": "",
    "parallel/mesh.py": "import torch.distributed as dist\n\ndef f():\n    import yunchang",
    "attention.py": "import torch\nfrom sp_sparse.kernels import base\nfrom sp_sparse.parallel.mesh import Mesh",
    "integrations/__init__.py": "",
    "integrations/diffusers/__init__.py": "import diffusers\nimport sp_sparse",
    "generate/__init__.py": "from sp_sparse.integrations.diffusers import enable",
    "serve/__init__.py": "import fastapi\nfrom sp_sparse.generate import main",
}


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / PACKAGE


def test_a_good_tree_passes(tmp_path: Path) -> None:
    imports = read(_write(tmp_path, GOOD))
    assert len(imports) == 21
    assert [text for rule in RULES for text in rule(imports)] == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "expected"),
    [
        (upwards, "selection/rows.py", "from sp_sparse.kernels.base import Kernel", "selection may not import kernels"),
        (
            upwards,
            "parallel/merge.py",
            "from sp_sparse.kernels import base",
            "merge:1 imports sp_sparse.kernels",
        ),
        (upwards, "kernels/own.py", "from ..parallel.mesh import Mesh", "imports sp_sparse.parallel.mesh"),
        (upwards, "kernels/own.py", "from .. import attention", "kernels may not import attention"),
        (upwards, "recorder.py", "def f():\n    import sp_sparse.parallel.mesh", "recorder:2 imports"),
        (upwards, "config.py", "import sp_sparse.integrations", "base may not import integrations"),
        (upwards, "config.py", "from sp_sparse import SparseAttention", "base may not import package"),
        (upwards, "attention.py", "import sp_sparse.generate", "attention may not import generate"),
        (upwards, "integrations/opaque.py", "import sp_sparse.generate", "integrations may not import generate"),
        (upwards, "generate/job.py", "from sp_sparse.serve import jobs", "generate may not import serve"),
        (upwards, "generate/job.py", "from sp_sparse.fidelity import plan", "generate may not import fidelity"),
        (upwards, "serve/web.py", "from sp_sparse.fidelity import plan", "serve may not import fidelity"),
        (upwards, "misc.py", "import torch", "sp_sparse.misc has no layer"),
        (upwards, "kernels/own.py", "import sp_sparse.misc", "kernels may not import None"),
        (third_party, "kernels/own.py", "from diffusers.models import x", "imports diffusers.models.x (allowed are fl"),
        (third_party, "parallel/own.py", "def f():\n    import vllm_omni", "parallel.own:2 imports vllm_omni"),
        (third_party, "attention.py", "try:\n    import fastapi\nexcept ImportError:\n    pass", "attention:2"),
        (third_party, "mask.py", "import yunchang", "allowed are numpy, torch, triton, yaml"),
        (third_party, "__init__.py", "import torch", "allowed are none"),
        (third_party, "integrations/opaque.py", "import fastapi", "imports fastapi"),
        (third_party, "serve/web.py", "from launch.job import run", "imports launch.job.run"),
        (ranks, "selection/rows.py", "import torch.distributed as dist", "selection.rows:1"),
        (ranks, "kernels/own.py", "from torch.distributed import ProcessGroup", "imports torch.distributed.ProcessG"),
        (ranks, "kernels/own.py", "from torch import distributed", "imports torch.distributed"),
        (ranks, "kernels/own.py", "import torch\n\ntorch.distributed.barrier()", "kernels.own:3"),
        (video, "parallel/shards.py", "from sp_sparse.video import VideoGrid", "imports sp_sparse.video"),
        (
            circles,
            "triton_split.py",
            "from sp_sparse.mask import BlockMask",
            "sp_sparse.mask -> sp_sparse.triton_split",
        ),
        (
            circles,
            "selection/rows.py",
            "def f():\n    from . import topk",
            "selection.rows -> sp_sparse.selection.topk",
        ),
        (
            circles,
            "integrations/diffusers/call.py",
            "from . import call",
            "call -> sp_sparse.integrations.diffusers.call",
        ),
        (circles, "attention.py", "from sp_sparse import layer", "sp_sparse -> sp_sparse.attention -> sp_sparse"),
    ],
)
def test_what_breaks_a_rule_is_found(rule: Rule, file: str, text: str, expected: str, tmp_path: Path) -> None:
    broken = list(rule(read(_write(tmp_path, {**GOOD, file: text}))))
    assert len(broken) == 1
    assert expected in broken[0]
