"""Documents keep up with the code: every flag is described, every link leads somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sp_sparse import SparseAttentionConfig
from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.fidelity.plan import told_value
from sp_sparse.flags import flag_of, options_of
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.serve.arguments import ServeArguments

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_flag_is_described() -> None:
    flags = [option.name for option in options_of(GenerateArguments)]
    flags += [f"sparse_attn_{option.name}" for option in fields(SparseAttentionConfig)]
    described = set(re.findall(r"^\| `--([a-z0-9-]+)`", (ROOT / "docs/flags.md").read_text(), re.MULTILINE))
    assert described == {name.replace("_", "-") for name in flags}


def test_every_flag_of_the_server_is_described() -> None:
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)` \| (.*?) \| (.*?) \|$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE
    )
    told = {flag: (default, text) for flag, default, text in rows}
    assert set(told) == {flag_of(option.name) for option in options_of(ServeArguments)}
    for option in options_of(ServeArguments):
        default, text = told[flag_of(option.name)]
        assert default == (
            "–" if option.default in (None, ()) else "off" if option.default is False else str(option.default)
        )
        assert text.startswith(option.metadata["help"])


def test_every_flag_of_fidelity_is_described() -> None:
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)` \| (.*?) \| (.*?) \|$", (ROOT / "docs/fidelity.md").read_text(), re.MULTILINE
    )
    told = {flag: (default, text) for flag, default, text in rows}
    assert set(told) == {flag_of(option.name) for option in options_of(FidelityArguments)}
    for option in options_of(FidelityArguments):
        default, text = told[flag_of(option.name)]
        values = option.default if isinstance(option.default, tuple) else (option.default,)
        expected = ",".join("off" if option.metadata["parse"] is bool else told_value(value) for value in values)
        assert default == ("–" if option.default in (None, (), "") else expected)
        assert text.startswith(option.metadata["help"])


def test_every_field_of_a_line_of_fidelity_is_described() -> None:
    text = (ROOT / "docs/fidelity.md").read_text()
    table = text[text.index("A line of `fidelity.jsonl`") : text.index("## How to read it")]
    fields_told = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    source = (ROOT / "sp_sparse/fidelity/measurement.py").read_text()
    assert fields_told - {"psnr", "ssim", "lpips"} <= set(re.findall(r'"([a-z_]+)": ', source))


def test_every_field_of_a_request_is_described() -> None:
    from sp_sparse.serve.requests import VideoRequest

    text = (ROOT / "docs/serving.md").read_text()
    table = text[text.index("### Fields of a request") : text.index("### Fields of a job")]
    assert set(VideoRequest.model_fields) <= set(re.findall(r"`([a-z0-9_]+)`", table))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
