"""Finding kernels by name, entry point or class path, and refusing those that cannot serve: never a substitute."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor

from sp_sparse import BlockMask, SequenceParallelMesh, SparseAttention, SparseAttentionConfig, plugins
from sp_sparse.kernels import registry
from sp_sparse.kernels.base import KernelInfo
from sp_sparse.kernels.reference import ReferenceKernel
from sp_sparse.kernels.registry import KernelRequest, load_kernel, select_kernel, why_not

CPU = KernelRequest(torch.device("cpu"), torch.float32, 64, (128, 128), needs_lse=False)


class PlainKernel(ReferenceKernel):
    """A kernel of another package."""

    info = KernelInfo(name="plain")


class NoLseKernel(ReferenceKernel):
    """Its output is right, its LSE is not given."""

    info = KernelInfo(name="no-lse", returns_lse=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, None]:
        return super().__call__(query, key, value, mask, scale)[0], None


class NarrowKernel(ReferenceKernel):
    """Runs little."""

    info = KernelInfo(
        name="narrow",
        device_types=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(64, 128),
        block_sizes=((128, 128), (128, 64)),
        min_capability=(8, 0),
        max_capability=(9, 0),
        extra="narrow",
    )


class MissingKernel(ReferenceKernel):
    """Its package is not installed."""

    info = KernelInfo(name="missing")

    def missing(self) -> str | None:
        return "package fastattn is not installed; pip install sp-sparse[fastattn]"


@pytest.fixture(autouse=True)
def _only_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in kernels of this machine would make the texts depend on it."""
    _build_in(monkeypatch, {"reference": "sp_sparse.kernels.reference:ReferenceKernel"})
    monkeypatch.setattr(registry, "AUTO_ORDER", ("reference",))


def _build_in(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, str]) -> None:
    monkeypatch.setattr(registry, "KERNELS", replace(registry.KERNELS, built_in=kernels))


def _offer(monkeypatch: pytest.MonkeyPatch, **paths: str) -> None:
    """Install entry points."""
    points = [EntryPoint(name, path, registry.KERNELS.group) for name, path in paths.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "sp_sparse.kernels" else [])


def _layer(backend: str, ring: int = 1) -> SparseAttention:
    mesh = SequenceParallelMesh()
    object.__setattr__(mesh, "ring_degree", ring)
    config = SparseAttentionConfig(backend=backend, schedule="constant", topk=0.5, block_size=(8, 8))
    return SparseAttention(config, mesh, num_heads=2, head_dim=8)


def test_built_in() -> None:
    assert isinstance(load_kernel("reference"), ReferenceKernel)
    assert registry.KERNELS.names()[0] == "reference"


def test_every_built_in_is_in_auto_and_named_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert set(registry.AUTO_ORDER) <= set(registry.KERNELS.built_in)
    assert registry.AUTO_ORDER[-1] == "reference", "what runs everywhere comes last"
    assert load_kernel("reference").info.name == "reference"


@pytest.mark.parametrize("make", [load_kernel, lambda name: select_kernel(name, CPU), _layer])
def test_unknown(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    _offer(monkeypatch, plugged="tests.test_registry:PlainKernel")
    with pytest.raises(
        ValueError, match="unknown sparse attention backend 'refrence'; use one of auto, none, reference, "
    ):
        make("refrence")
    with pytest.raises(ValueError, match=r"plugged, or a class path package.module:Class"):
        make("refrence")


def test_class_path() -> None:
    assert isinstance(load_kernel("tests.test_registry:PlainKernel"), PlainKernel)
    layer = _layer("tests.test_registry:PlainKernel")
    q = torch.randn(1, 32, 2, 8)
    torch.testing.assert_close(layer(q, q, q, grid=(1, 4, 8)), _layer("reference")(q, q, q, grid=(1, 4, 8)))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package:Kernel", "No module named 'no_such_package'"),
        ("tests.test_registry:NoSuchKernel", "NoSuchKernel"),
        ("tests.no_such_module:Kernel", "no_such_module"),
        (":Kernel", "Empty module name"),
        (".relative:Kernel", "relative import"),
    ],
)
def test_class_path_that_cannot_be_loaded(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{path}' cannot be loaded: .*{reason}"):
        load_kernel(path)


@pytest.mark.parametrize("path", ["os:getcwd", "os:sep", "collections:OrderedDict"])
def test_what_is_no_kernel(path: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{path}' is no class with missing, __call__; give .*, or use one of auto, none"
    ):
        load_kernel(path)


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, zeta="tests.test_registry:PlainKernel", alpha="tests.test_registry:NoLseKernel")
    assert registry.KERNELS.names() == ("reference", "alpha", "zeta")
    assert isinstance(load_kernel("zeta"), PlainKernel)
    assert isinstance(select_kernel("alpha", CPU), NoLseKernel)


def test_entry_point_does_not_replace_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, reference="tests.test_registry:PlainKernel")
    assert registry.KERNELS.names() == ("reference",)
    assert type(load_kernel("reference")) is ReferenceKernel


def test_broken_entry_point_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, broken="no_such_package:Kernel", nolse="tests.test_registry:NoLseKernel")
    with pytest.raises(ValueError, match="backend 'broken' cannot be loaded: No module named 'no_such_package'"):
        load_kernel("broken")
    with pytest.raises(ValueError, match=r"'nolse' cannot run here: it returns no LSE.*; use auto, reference$"):
        select_kernel("nolse", replace(CPU, needs_lse=True))
    with pytest.raises(ValueError, match=r"'nolse' returns no LSE.*use reference, or ring_degree=1"):
        _layer("nolse", ring=2)


def test_no_lse_is_refused_for_ring_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, nolse="tests.test_registry:NoLseKernel", plain="tests.test_registry:PlainKernel")
    with pytest.raises(
        ValueError,
        match=r"'nolse' returns no LSE, which ring parallelism needs .*; use reference, plain, or ring_degree=1",
    ):
        _layer("nolse", ring=2)
    q = torch.randn(1, 32, 2, 8)
    expected = _layer("reference")(q, q, q, grid=(1, 4, 8))
    torch.testing.assert_close(_layer("nolse")(q, q, q, grid=(1, 4, 8)), expected)
    with pytest.raises(ValueError, match="'nolse' cannot run here: it returns no LSE"):
        select_kernel("nolse", replace(CPU, needs_lse=True))


CUDA = replace(CPU, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (CPU, "device cpu is not among cuda"),
        (replace(CUDA, dtype=torch.float32), "dtype torch.float32 is not among torch.float16, torch.bfloat16"),
        (replace(CUDA, head_dim=96), "head dimension 96 is not among 64, 128"),
        (replace(CUDA, block_size=(64, 64)), r"block size (64, 64) is not among (128, 128), (128, 64)"),
        (CUDA, None),
    ],
)
def test_reasons_name_both_sides(request_: KernelRequest, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _offer(monkeypatch, narrow="tests.test_registry:NarrowKernel")
    assert why_not(NarrowKernel(), request_) == reason
    if reason is None:
        assert isinstance(select_kernel("narrow", request_), NarrowKernel)
        return
    with pytest.raises(ValueError) as error:
        select_kernel("narrow", request_)
    assert str(error.value) == f"sparse attention backend 'narrow' cannot run here: {reason}; use auto, reference"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "7.5 is outside 8.0 to 9.0"), ((8, 0), None), ((9, 0), None), ((10, 0), "10.0 is outside 8.0 to 9.0")],
)
def test_compute_capability(capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not(NarrowKernel(), CUDA) == (None if reason is None else f"compute capability {reason}")
    newest = NarrowKernel()
    newest.info = replace(newest.info, max_capability=None)
    assert (why_not(newest, CUDA) is None) == (capability >= (8, 0))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, gone="tests.test_registry:MissingKernel")
    with pytest.raises(ValueError, match=r"'gone' cannot run here: package fastattn is not installed; pip install .*"):
        select_kernel("gone", CPU)


def test_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _build_in(monkeypatch, {"narrow": "tests.test_registry:NarrowKernel"})
    monkeypatch.setattr(registry, "AUTO_ORDER", ("narrow",))
    _offer(monkeypatch)
    with pytest.raises(ValueError, match=r"'narrow' cannot run here: device cpu .*; no installed backend can"):
        select_kernel("narrow", CPU)
    with pytest.raises(
        ValueError, match="no sparse attention backend can run here: narrow: device cpu is not among cuda"
    ):
        select_kernel("auto", CPU)


def test_auto_takes_the_first_that_runs_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = {"narrow": "NarrowKernel", "nolse": "NoLseKernel", "plain": "PlainKernel", "reference": "ReferenceKernel"}
    _build_in(monkeypatch, {n: f"tests.test_registry:{c}" for n, c in kernels.items()})
    monkeypatch.setattr(registry, "AUTO_ORDER", tuple(kernels))
    with caplog.at_level(logging.INFO, logger="sp_sparse"):
        assert isinstance(select_kernel("auto", replace(CPU, needs_lse=True)), PlainKernel)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("sparse attention backend auto: plain on cpu")
    assert "not narrow: device cpu is not among cuda" in line
    assert "not nolse: it returns no LSE" in line
    assert isinstance(select_kernel("auto", CPU), NoLseKernel)


def test_layer_checks_the_kernel_against_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, narrow="tests.test_registry:NarrowKernel")
    layer = _layer("narrow")
    q = torch.zeros(1, 32, 2, 8)
    with pytest.raises(ValueError, match="'narrow' cannot run here: device cpu is not among cuda; use auto, reference"):
        layer(q, q, q, grid=(1, 4, 8))


def test_layer_asks_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[KernelRequest] = []

    def spy(name: str, request: KernelRequest, *options: object) -> ReferenceKernel:
        seen.append(request)
        return ReferenceKernel()

    monkeypatch.setattr("sp_sparse.attention.select_kernel", spy)
    layer = _layer("reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        q = torch.zeros(1, 32, 2, 8, dtype=dtype)
        layer(q, q, q, grid=(1, 4, 8))
    assert seen == [
        KernelRequest(torch.device("cpu"), d, 8, (8, 8), needs_lse=False) for d in (torch.float32, torch.bfloat16)
    ]
