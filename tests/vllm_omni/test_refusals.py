"""What cannot run sparse is refused, at construction where that is possible, and never runs dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, VideoTokenLayout, VideoTokenSpan
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import DiffusionParallelConfig

from sp_sparse.integrations.vllm_omni import omni_attention, versions
from sp_sparse.integrations.vllm_omni.backend import SparseAttentionBackend, SparseAttentionImpl
from sp_sparse.parallel.agreement import RefusedError
from tests.ranks import run_ranks
from tests.vllm_omni.wan import Job, Mesh, built, has_ulysses_allgather

GRID = (4, 6, 9)
HOOKED = "_run_ring_attention"


def _build(rank: int, mesh: Mesh, job: Job, message: str, step: int | None = None) -> None:
    """Fails to build, or with a step to run, with this message."""
    if step is None:
        with pytest.raises((RuntimeError, ValueError), match=message), built(mesh, job):
            pass
        return
    with (
        built(mesh, job) as (_, forward),
        torch.no_grad(),
        pytest.raises((RuntimeError, ValueError), match=message),
    ):
        forward(step)


@pytest.mark.parametrize(
    ("mesh", "job", "message"),
    [
        (Mesh(), Job(GRID, options={"tokn_order": "tile"}), "unknown options tokn_order"),
        (Mesh(), Job(GRID, options={"backend": "fa4"}), "'fa4' cannot run here: device cpu is not among cuda"),
        (
            Mesh(ring=2),
            Job(GRID, options={"token_order": "tile"}),
            "under ring 2 vllm-omni cuts .* use token_order raster",
        ),
        (
            Mesh(allgather=2),
            Job(GRID, options={"token_order": "tile"}),
            "under all-gather-KV 2 .* use token_order raster",
        ),
        (Mesh(ulysses=2), Job(GRID, parallel={"mask_sp_padding": True}), "mask_sp_padding .* leave it out"),
    ],
    ids=["unknown-key", "kernel", "order-ring", "order-allgather", "mask"],
)
def test_construction(mesh: Mesh, job: Job, message: str) -> None:
    run_ranks(mesh.ranks, _build, mesh, job, message)


def test_a_ring_of_padded_tokens_is_refused_by_vllm_omni() -> None:
    message = r"Sequence length \(75\) is not divisible by SP world size \(2\)"
    run_ranks(2, _build, Mesh(ring=2), Job((3, 5, 5)), message, 3)


@pytest.mark.skipif(has_ulysses_allgather(), reason="this vllm-omni composes them: test_meshes")
def test_all_gathered_keys_within_ulysses_are_refused_by_vllm_omni_0_30() -> None:
    with pytest.raises((AssertionError, ValueError), match="mutually exclusive with Ulysses/Ring"):
        DiffusionParallelConfig(ulysses_degree=2, allgather_degree=2)


def test_heads_that_do_not_divide_are_refused_by_vllm_omni_without_its_flag() -> None:
    run_ranks(3, _build, Mesh(ulysses=3), Job(GRID), "ulysses_mode='advanced_uaa'", 3)


def _check_ring(rank: int, spoil: Callable[[], Any], message: str) -> None:
    with spoil():
        _build(rank, Mesh(ring=2), Job(GRID), message)


def _hook_that_does_not_hold() -> Any:
    return mock.patch.object(omni_attention, "_place", return_value=None)


def _other_parameters() -> Any:
    def run(self: Any, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any, window: int) -> None:
        """Another version's."""

    return mock.patch.object(Attention, HOOKED, run)


def _not_there() -> Any:
    return mock.patch.object(Attention, HOOKED, None)


def _uncalled(self: Any, query: Any, key: Any, value: Any, attn_metadata: Any) -> None:
    """Another version's."""


def _not_called() -> Any:
    return mock.patch.object(Attention, "_forward_impl", _uncalled)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_hook_that_does_not_hold, "hook on Attention._run_ring_attention is not in place.*runs dense"),
        (_other_parameters, r"Attention._run_ring_attention has parameters .*'window'\], expected \['self'"),
        (_not_there, "Attention._run_ring_attention has parameters None"),
        (_not_called, "cannot be reached.*not called by _forward_impl"),
    ],
)
def test_a_ring_without_its_hook_is_not_built(spoil: Callable[[], Any], message: str) -> None:
    assert not hasattr(getattr(Attention, HOOKED), omni_attention._MARK), (
        "nothing is replaced before a ring is asked for"
    )
    run_ranks(2, _check_ring, spoil, message)


def _check_passed_over(rank: int) -> None:
    with built(Mesh(ring=2), Job(GRID)) as (transformer, _):
        layer = transformer.sparse_layers()[0]
        shard = torch.randn(1, 108, 4, 32)
        with pytest.raises(ValueError, match=r"108 queries and 108 keys of a video of 216 tokens .* passed over"):
            layer.local(shard, shard, shard, *GRID)


def _check_not_gathered(rank: int) -> None:
    with built(Mesh(allgather=2), Job(GRID)) as (transformer, _):
        layer = transformer.sparse_layers()[0]
        shard = torch.randn(1, 108, 4, 32)
        message = (
            r"108 queries and 108 keys .* under all-gather-KV 2, where it expects 108 queries and 216 gathered keys"
        )
        with pytest.raises(ValueError, match=message):
            layer.local(shard, shard, shard, *GRID)


def test_a_shard_is_never_taken_for_the_sequence() -> None:
    run_ranks(2, _check_passed_over)
    run_ranks(2, _check_not_gathered)


def _check_hook_leaves_others_alone(rank: int) -> None:
    """Another backend in the same process runs vllm-omni's own ring."""
    with built(Mesh(ring=2), Job(GRID)) as (transformer, _):
        attention = transformer.model.blocks[0].attn1.attn
        assert isinstance(attention.attention, SparseAttentionImpl)
        other = mock.Mock(spec=["ring_runner", "softmax_scale", "causal", "attention"])
        other.attention, other.softmax_scale, other.causal = object(), 0.5, False
        Attention._run_ring_attention(other, "q", "k", "v", None)
        other.ring_runner.run_attention.assert_called_once_with("q", "k", "v", None, softmax_scale=0.5, causal=False)


def _check_hook_goes_by_our_name_alone(rank: int) -> None:
    """Not by a name that another backend may use for its own ring."""
    with built(Mesh(ring=2), Job(GRID)):
        other = mock.Mock(spec=["ring_runner", "softmax_scale", "causal", "attention"])
        other.attention = mock.Mock(spec=["forward_ring", "run_attention", "ring"])
        Attention._run_ring_attention(other, "q", "k", "v", None)
        other.ring_runner.run_attention.assert_called_once()
        assert not other.attention.mock_calls
        other.attention = mock.Mock(spec=["sp_sparse_ring"])
        Attention._run_ring_attention(other, "q", "k", "v", None)
        other.attention.sp_sparse_ring.assert_called_once_with("q", "k", "v", None)
        other.ring_runner.run_attention.assert_called_once()


def test_the_hook_goes_by_our_name_alone() -> None:
    run_ranks(2, _check_hook_goes_by_our_name_alone)


def test_the_hook_leaves_other_backends_alone() -> None:
    run_ranks(2, _check_hook_leaves_others_alone)


SPAN = VideoTokenSpan(start=0, latent_grid=GRID, role="target")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"does not tell the grid of its video \(video_layout\)"),
        (AttentionMetadata(), "does not tell the grid"),
        (AttentionMetadata(video_layout=VideoTokenLayout(prefix_len=7, latent_grid=GRID)), "more than one video"),
        (AttentionMetadata(video_layout=VideoTokenLayout(latent_grid=GRID, used_len=300)), "more than one video"),
        (
            AttentionMetadata(video_layout=VideoTokenLayout(latent_grid=GRID, video_spans=(SPAN,))),
            "more than one video",
        ),
        (
            AttentionMetadata(video_layout=VideoTokenLayout(latent_grid=GRID), attn_mask=torch.ones(1, 216)),
            "has attn_mask, which SP_SPARSE does not take",
        ),
    ],
    ids=["none", "no-layout", "prefix", "longer", "spans", "mask"],
)
def test_sequences_that_are_not_one_video(metadata: AttentionMetadata | None, message: str) -> None:
    query, key, value = torch.randn(3, 1, 216, 4, 32)
    with pytest.raises(ValueError, match=message):
        _implementation().forward_cuda(query, key, value, metadata)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"role": "joint"}, "serves self-attention, and layer 'blocks.0.attn1' has role 'joint'"),
        ({"causal": True}, "causal=True"),
        ({"num_kv_heads": 2}, "4 query and 2 key heads"),
        ({"qkv_layout": "BNSD"}, "qkv_layout='BNSD'"),
        ({"prefix": "attn", "backend_kwargs": {"skip_layers": [1]}}, "layer 'attn' has no number"),
    ],
)
def test_other_layers(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _implementation(**layer)


def _implementation(**changed: Any) -> SparseAttentionImpl:
    layer = {"num_heads": 4, "head_size": 32, "softmax_scale": 32**-0.5, "num_kv_heads": 4, "prefix": "blocks.0.attn1"}
    return SparseAttentionImpl(**{**layer, "qkv_layout": "BSND", "role": "self", **changed})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"vllm-omni": "0.31.0rc1"}, r"vllm-omni 0\.31\.0rc1 is installed, but SP_SPARSE knows"),
        ({"vllm-omni": "0.33.0"}, r"vllm-omni 0\.33\.0 is installed, but SP_SPARSE knows"),
        ({"vllm-omni": "0.3.0"}, r"vllm-omni 0\.3\.0 is installed, but SP_SPARSE knows"),
        (
            {"vllm-omni": "0.30.1", "vllm": "0.32.0"},
            r"0\.30\.1 is installed with vllm 0\.32\.0, but goes with vllm 0\.30\.\*",
        ),
        ({"vllm-omni": "0.32.0rc1", "vllm": None}, r"0\.32\.0rc1 is installed without vllm"),
        ({"vllm-omni": None}, "vllm-omni is not installed"),
    ],
    ids=str,
)
def test_another_version(found: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", partial(_version, found))
    message += (
        r'.* vllm-omni 0\.30\.\* and 0\.32\.\*; pip install "sp-sparse\[vllm\]" for 0\.30 or .*\[vllm-rc\]" for 0\.32$'
    )
    with pytest.raises(RuntimeError, match=message):
        SparseAttentionBackend.validate_available()
    with pytest.raises(RuntimeError, match=message):
        _implementation()


def _version(found: dict[str, str | None], name: str) -> str:
    if found[name] is None:
        raise PackageNotFoundError(name)
    return str(found[name])


def test_the_series_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for series in versions.SUPPORTED:
        for found in (f"{series}.0", f"{series}.1", f"{series}.0rc1"):
            monkeypatch.setattr(versions, "version", lambda name, found=found: found)
            assert versions.wrong_version() is None


def _other_signature(*_: Any, window: int = 0) -> None:
    """Another version's."""


@pytest.mark.parametrize(("module", "name"), versions._EXPECTED, ids=lambda name: name.rpartition(".")[2])
def test_a_part_that_has_changed_fails_at_construction(module: str, name: str) -> None:
    _implementation()
    owner, _, last = name.rpartition(".")
    target = f"{module}.{owner}" if owner else module
    for other, said in ((_other_signature, r"\['_', 'window'\]"), (None, "None")):
        message = rf"{name} has parameters {said}, expected \[.*install an unchanged vllm-omni 0\.30 or 0\.32"
        with mock.patch(f"{target}.{last}", other), pytest.raises(RuntimeError, match=message):
            _implementation()


def _check_apart(rank: int, mesh: Mesh, block_sparse: dict[str, Any]) -> None:
    """A rank one step ahead, on which attention may be sparse already where the others' is dense."""
    with built(mesh, Job(GRID, block_sparse)) as (_, forward), torch.no_grad():
        last = rank == mesh.ranks - 1
        steps = "; ".join(f"rank {r}: {3 if r == mesh.ranks - 1 else 2}" for r in range(mesh.ranks))
        with pytest.raises(RefusedError, match=rf"^ranks differ in step \({steps}\); .*start the server anew$"):
            forward(3 if last else 2)
        assert forward(3).isfinite().all()


@pytest.mark.parametrize(
    "block_sparse", [{"sparsity": 0.6}, {"sparsity": 0.6, "start_step": 3}], ids=["sparse", "dense"]
)
@pytest.mark.parametrize("mesh", [Mesh(ulysses=2), Mesh(ring=2), Mesh(2, 2), Mesh(allgather=2)], ids=str)
def test_ranks_that_are_not_at_the_same_step(mesh: Mesh, block_sparse: dict[str, Any]) -> None:
    run_ranks(mesh.ranks, _check_apart, mesh, block_sparse)


def _check_met(rank: int) -> None:
    """Once a forward of both layers, on the host."""
    with built(Mesh(2, 2), Job(GRID)) as (_, forward), torch.no_grad():
        forward(3)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as met:
            forward(3)
        assert met.call_count == 1
        assert met.call_args.args[0].device.type == "cpu"


def test_ranks_meet_once_a_forward() -> None:
    run_ranks(4, _check_met)
