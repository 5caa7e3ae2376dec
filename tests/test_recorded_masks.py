"""Recording masks: the same bits from every mesh, a file that is read again, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sp_sparse import SparseAttentionConfig
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.job import generate
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.recorded_masks import RecordedMasks, check_records
from sp_sparse.parallel.agreement import RefusedError
from tests.ranks import run_ranks

SPARSE = (
    *(
        "--model",
        "tiny",
        "--sparse-attn-backend",
        "reference",
        "--sparse-attn-topk",
        "0.3",
        "--num-inference-steps",
        "2",
    ),
    *("--sparse-attn-schedule", "constant"),
)


def _generate(rank: int, folder: str, flags: list[str]) -> None:
    assert main([*SPARSE, *flags, "--output", f"{folder}/video.mp4", "--output-masks", f"{folder}/masks.npz"]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RecordedMasks:
    folder = tmp_path_factory.mktemp("one")
    _generate(0, str(folder), [])
    return RecordedMasks.load(folder / "masks.npz")


def test_one_rank(whole: RecordedMasks) -> None:
    """320 tokens in 20 blocks of 16, 8 heads; two layers and two steps, of which each expert has its own."""
    assert whole.block_size == (16, 16)
    assert whole.tokens == 320
    assert {place[1] for place in whole.places} == {0, 1}
    assert whole.bits.shape == (len(whole.places), 8, 20, 3)
    assert whole.about["topk"] == 0.3
    masks = np.stack([whole.dense(number) for number in range(len(whole.places))])
    assert (masks.sum(-1) == 6).all()  # 0.3 of 20 blocks, in each row
    assert masks[..., range(20), range(20)].all()  # its own among them
    assert not (masks == masks[:, :1]).all()  # heads differ


@pytest.mark.parametrize(("ranks", "mesh"), [
    (3, ("--ulysses-degree", "3")),
    (3, ("--ring-degree", "3")),
    (4, ("--ulysses-degree", "2", "--ring-degree", "2")),
    (2, ("--cfg-parallel-degree", "2")),
])  # fmt: skip
def test_every_mesh_records_the_same(tmp_path: Path, whole: RecordedMasks, ranks: int, mesh: tuple[str, ...]) -> None:
    run_ranks(ranks, _generate, str(tmp_path), list(mesh))
    found = RecordedMasks.load(tmp_path / "masks.npz")
    assert found.places == whole.places
    # Masks of later calls may part where outputs are rounded otherwise; the first call has the very same inputs.
    np.testing.assert_array_equal(found.bits[0], whole.bits[0])


def test_what_is_no_recording_is_refused(tmp_path: Path, whole: RecordedMasks) -> None:
    path = tmp_path / "masks.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no recorded masks .*--output-masks"):
        RecordedMasks.load(path)
    np.savez(path, bits=whole.bits)
    with pytest.raises(ValueError, match="no recorded masks"):
        RecordedMasks.load(path)
    RecordedMasks(whole.places, whole.bits[..., :2], whole.block_size, whole.tokens, whole.about).save(path)
    with pytest.raises(ValueError, match="20 key blocks; record them again"):
        RecordedMasks.load(path)


def test_dense_steps_have_no_masks() -> None:
    with pytest.raises(ValueError, match="was dense; give --sparse-attn-schedule"):
        RecordedMasks.assemble([({}, None)], 1, {})


@pytest.mark.parametrize(
    "flags",
    [
        ("--sparse-attn-schedule", "conservative", "--num-inference-steps", "1"),
        ("--sparse-attn-dense-steps", "2"),
        ("--sparse-attn-dense-layers", "2"),
        ("--sparse-attn-topk", "1"),
    ],
)
def test_a_job_without_masks_to_record_is_refused_before_the_model_is_loaded(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    outputs = ["--output", str(tmp_path / "video.mp4"), "--output-masks", str(tmp_path / "masks.npz")]
    with pytest.raises(RefusedError, match=r"of 2 layers and . steps, dense; give .*or leave --output-masks out"):
        generate(parse_arguments([*SPARSE, *flags, *outputs]), Ranks(0, 1, torch.device("cpu")), load)


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (SparseAttentionConfig(topk=0.5, schedule="conservative"), 1),
        (SparseAttentionConfig(topk=0.5, schedule="constant", dense_steps=3, dense_layers=39), 1),
        (SparseAttentionConfig(topk=1.0, topk_2=0.5, schedule="constant"), 2),
    ],
)
def test_one_sparse_place_is_enough(config: SparseAttentionConfig, experts: int) -> None:
    check_records(config, experts, layers=40, steps=4)


def test_a_second_expert_that_is_not_there_has_no_masks() -> None:
    with pytest.raises(ValueError, match="no masks to record"):
        check_records(SparseAttentionConfig(topk=1.0, topk_2=0.5, schedule="constant"), 1, layers=40, steps=4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--output-masks", "masks.npz"], "--sparse-attn-backend none leaves off"),
        (["--output-masks", "masks.pt", "--sparse-attn-backend", "auto"], "must end in .npz"),
    ],
)
def test_refused(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_arguments(["--model", "tiny", *flags])
