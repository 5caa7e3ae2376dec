"""Documents keep up with the code: every flag is described, every link leads somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from launch.arguments import GenerateArguments
from sp_sparse import SparseAttentionConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_flag_is_described() -> None:
    flags = [option.name for option in fields(GenerateArguments) if option.name != "sparse"]
    flags += [f"sparse_attn_{option.name}" for option in fields(SparseAttentionConfig)]
    described = set(re.findall(r"^\| `--([a-z0-9-]+)`", (ROOT / "docs/flags.md").read_text(), re.MULTILINE))
    assert described == {name.replace("_", "-") for name in flags}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
