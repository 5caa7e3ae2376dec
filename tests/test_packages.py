"""Optional packages: what is told of one that is missing, too old or broken, and what the registry makes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from sp_sparse.kernels import checks
from sp_sparse.kernels.checks import missing_package
from sp_sparse.kernels.registry import (
    KERNELS,
    KernelRequest,
    check_returns_lse,
    load_kernel,
    select_kernel,
    why_not,
)

OPTIONAL = {"fa4": "flash-attn-4", "flashinfer": "flashinfer-python"}
HOPPER = KernelRequest(torch.device("cuda", 0), torch.bfloat16, 128, (128, 128), needs_lse=True)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    missing_package.cache_clear()
    yield
    missing_package.cache_clear()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(checks, "version", version)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of version 1.2.0 whose module is `some_package.py` in this folder."""
    monkeypatch.setattr(checks, "version", lambda distribution: "1.2.0")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "some_package.py"


@pytest.mark.usefixtures("nothing_installed")
def test_not_installed() -> None:
    text = missing_package("some-package", "some_package", "1.0", "some")
    assert text == 'some-package is not installed; pip install "sp-sparse[some]"'


@pytest.mark.parametrize("minimum", ["1.3", "1.2.1b1", "2"])
def test_too_old(package: Path, minimum: str) -> None:
    text = missing_package("some-package", "some_package", minimum, "some")
    assert text == f'some-package 1.2.0 is older than {minimum}; pip install --upgrade "sp-sparse[some]"'


@pytest.mark.parametrize("error", ["OSError('libsome.so: no such file')", "AttributeError('moved')"])
def test_broken(package: Path, error: str) -> None:
    package.write_text(f"raise {error}")
    text = missing_package("some-package", "some_package", "1.2", "some")
    assert text is not None
    assert text.startswith("some-package 1.2.0 is installed but cannot be imported: " + error.split("(")[0])
    assert error.split("'")[1] in text


@pytest.mark.parametrize("minimum", ["1.2.0", "1.2.0b36", "0.9"])
def test_good(package: Path, minimum: str) -> None:
    package.write_text("")
    assert missing_package("good-package", "some_package", minimum, "some") is None


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_explicit_request_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    expected = (
        rf"'{name}' cannot run here: {OPTIONAL[name]} is not installed; pip install \"sp-sparse\[{name}\]\"; use auto"
    )
    with pytest.raises(ValueError, match=expected) as refusal:
        select_kernel(name, HOPPER)
    assert "reference" in str(refusal.value)


@pytest.mark.usefixtures("nothing_installed")
def test_auto_tells_why_fa4_is_passed_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with caplog.at_level(logging.INFO, "sp_sparse"):
        chosen = select_kernel("auto", HOPPER).info.name
    assert chosen in ("triton", "reference")
    assert f"auto: {chosen} on cuda:0; not fa4: flash-attn-4 is not installed" in caplog.text


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_no_installation_changes_is_told_first(name: str) -> None:
    kernel, cuda = load_kernel(name), torch.device("cuda", 0)
    for request, expected in (
        (KernelRequest(torch.device("cpu"), torch.bfloat16, 128, (128, 128), True), "device cpu is not among cuda"),
        (KernelRequest(cuda, torch.float32, 128, (128, 128), True), "dtype torch.float32 is not among torch.float16"),
        (KernelRequest(cuda, torch.bfloat16, 80, (128, 128), True), "head dimension 80 is not among 64"),
        (KernelRequest(cuda, torch.bfloat16, 128, (256, 64), True), "block size (256, 64) is not among (128, 128)"),
    ):
        assert expected in (why_not(kernel, request) or "")


@pytest.mark.parametrize(
    ("name", "capability", "limits"),
    [
        ("fa4", (8, 9), "9.0 to 10.3"),
        ("fa4", (12, 0), "9.0 to 10.3"),
        ("flashinfer", (7, 5), "8.0 to 9.0"),
        ("flashinfer", (10, 0), "8.0 to 9.0"),
    ],
)
def test_compute_capability(
    name: str, capability: tuple[int, int], limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = load_kernel(name)
    monkeypatch.setattr(kernel, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert why_not(kernel, HOPPER) == "compute capability {}.{} is outside {}".format(*capability, limits)


@pytest.mark.parametrize(
    ("capability", "block_size", "taken"),
    [((9, 0), (128, 128), True), ((9, 0), (256, 128), True), ((10, 0), (256, 128), True), ((10, 3), (128, 128), False)],
)
def test_blackwell_takes_one_block_size(
    capability: tuple[int, int], block_size: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = load_kernel("fa4")
    monkeypatch.setattr(kernel, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = why_not(kernel, replace(HOPPER, block_size=block_size))
    refused = "block size {} is not among (256, 128) on compute capability {}.{}".format(block_size, *capability)
    assert reason == (None if taken else refused)


def test_all_built_in_kernels_serve_a_ring() -> None:
    assert {"fa4", "triton", "flashinfer", "reference"} <= set(KERNELS.names())
    for name in ("fa4", "flashinfer"):
        check_returns_lse(name, "a ring needs", "ring_degree=1")
