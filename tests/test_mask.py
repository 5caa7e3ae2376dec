"""BlockMask against the dense bool mask it stands for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sp_sparse import BlockMask
from sp_sparse.mask import num_blocks
from tests.cases import narrowed, poisoned, random_blocks
from tests.oracle import expand


@dataclasses.dataclass
class Case:
    """A mask, the dense blocks it was built from, and edges that cut its keys."""

    mask: BlockMask
    dense: Tensor
    edges: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    query_length, key_length = draw(st.integers(0, 25)), draw(st.integers(0, 25))
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        num_blocks(query_length, block_size[0]),
        num_blocks(key_length, block_size[1]),
    )
    seed = draw(st.integers(0, 1000))
    dense = random_blocks(shape, seed, draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])))
    mask = BlockMask.from_dense(dense, block_size, query_length, key_length)
    if draw(st.booleans()):
        mask = narrowed(mask)
    if draw(st.booleans()):
        mask = poisoned(mask, seed)
    cuts = draw(st.lists(st.integers(0, shape[3]), max_size=5))
    edges = [0, *(min(cut * block_size[1], key_length) for cut in sorted(cuts)), key_length]
    return Case(mask, dense, edges)


@given(cases())
def test_round_trip(case: Case) -> None:
    mask = case.mask
    assert torch.equal(mask.to_dense(), case.dense)
    assert torch.equal(mask.counts, case.dense.sum(-1).int())
    assert mask.indices.dtype == mask.counts.dtype == torch.int32
    for row, count in zip(mask.indices.flatten(0, 2).tolist(), mask.counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count]))
        assert all(0 <= entry < mask.num_key_blocks for entry in row), "a kernel may load what a tail entry names"


@given(cases())
def test_split_keys_cuts_the_columns(case: Case) -> None:
    parts = case.mask.split_keys(case.edges)
    assert len(parts) == len(case.edges) - 1
    size = case.mask.block_size[1]
    for part, first, last in zip(parts, case.edges[:-1], case.edges[1:], strict=True):
        columns = case.dense[..., num_blocks(first, size) : num_blocks(last, size)]
        assert (part.query_length, part.key_length) == (case.mask.query_length, last - first)
        assert part.block_size == case.mask.block_size
        assert torch.equal(part.to_dense(), columns)
        assert torch.equal(part.counts, columns.sum(-1).int())
        entries = part.indices.flatten().tolist()
        assert all(0 <= entry < part.num_key_blocks for entry in entries), "rebased tails stay loadable"
    assert sum(part.attended_pairs().item() for part in parts) == case.mask.attended_pairs().item()


@given(cases())
def test_a_part_splits_again(case: Case) -> None:
    """Parts are full citizens: their rebased tables split like any other."""
    for part in case.mask.split_keys(case.edges):
        middle = part.num_key_blocks // 2 * part.block_size[1]
        halves = part.split_keys([0, middle, part.key_length])
        assert torch.equal(torch.cat([half.to_dense() for half in halves], -1), part.to_dense())


@given(cases(), st.data())
def test_keys_apart(case: Case, data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(case.edges))
    last = data.draw(st.sampled_from([edge for edge in case.edges if edge >= first]))
    inside, outside = case.mask.cut_keys(first, last)
    size = case.mask.block_size[1]
    columns = slice(num_blocks(first, size), num_blocks(last, size))
    assert torch.equal(inside.to_dense(), case.dense[..., columns])
    rest = case.dense.clone()
    rest[..., columns] = False
    assert torch.equal(outside.to_dense(), rest)
    assert (outside.counts == rest.sum(-1)).all()


@given(cases())
def test_density_counts_token_pairs(case: Case) -> None:
    mask = case.mask
    tokens = expand(case.dense, mask.block_size, mask.query_length, mask.key_length)
    assert mask.attended_pairs().dtype == mask.density().dtype == torch.float64
    assert mask.attended_pairs().item() == tokens.sum().item()
    assert mask.density().item() == pytest.approx(tokens.sum().item() / max(tokens.numel(), 1), abs=1e-15)


def test_key_split_of_a_known_table() -> None:
    dense = torch.tensor([[[[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]]], dtype=torch.bool)
    mask = BlockMask.from_dense(dense, (8, 4), 20, 18)
    assert mask.indices[0, 0, 0, :3].tolist() == [0, 2, 3]
    first, empty, last = mask.split_keys([0, 8, 8, 18])
    assert first.counts.tolist() == [[[1, 0, 1]]]
    assert empty.indices.shape == (1, 1, 3, 0)
    assert empty.counts.tolist() == [[[0, 0, 0]]]
    assert last.indices[0, 0, 0, :2].tolist() == [0, 1]
    assert last.indices[0, 0, 2, 0].item() == 2
    # 8 x 4 tokens a whole block pair; the last row holds 4 tokens and the last column 2.
    assert mask.attended_pairs().item() == 8 * (4 + 4 + 4) + 4 * (4 + 2)


def test_mask_code_never_waits_for_the_device() -> None:
    """Tensors on `meta` hold no values, so anything that reads one raises."""
    dense = torch.zeros(1, 2, 4, 5, dtype=torch.bool, device="meta")
    mask = BlockMask.from_dense(dense, (8, 4), 30, 19)
    parts = mask.split_keys([0, 8, 8, 19])
    assert [part.indices.shape[3] for part in parts] == [2, 0, 3]
    assert mask.density().device.type == mask.to_dense().device.type == "meta"


def test_frozen() -> None:
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), (8, 8), 8, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.key_length = 16  # type: ignore[misc]


def _arguments(**changes: Any) -> dict[str, Any]:
    return {
        "indices": torch.zeros(1, 2, 3, 4, dtype=torch.int32),
        "counts": torch.zeros(1, 2, 3, dtype=torch.int32),
        "block_size": (8, 8),
        "query_length": 20,
        "key_length": 32,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"block_size": (0, 8)}, ValueError, r"block_size must be positive, got \(0, 8\)"),
        ({"block_size": (8, -1)}, ValueError, "block_size must be positive"),
        ({"indices": torch.zeros(1, 2, 3, 4).long()}, TypeError, r"torch.int64 and torch.int32; convert with .int\(\)"),
        ({"counts": torch.zeros(1, 2, 3)}, TypeError, "must be int32, got torch.int32 and torch.float32"),
        ({"indices": torch.zeros(2, 3, 4).int()}, ValueError, r"indices \(2, 3, 4\) and counts \(1, 2, 3\) disagree"),
        ({"counts": torch.zeros(1, 1, 3).int()}, ValueError, r"counts \(1, 1, 3\) disagree"),
        ({"counts": torch.zeros(1, 2, 3, 4).int()}, ValueError, "disagree"),
        ({"query_length": 25}, ValueError, "3 mask rows do not cover 25 query tokens in blocks of 8; expected 4 rows"),
        ({"query_length": 16}, ValueError, "expected 2 rows"),
        ({"key_length": 24}, ValueError, "table width 4 exceeds the 3 key blocks; drop the extra columns"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    BlockMask(**_arguments())
    with pytest.raises(error, match=match):
        BlockMask(**_arguments(**changes))


@pytest.mark.parametrize("edges", [(0, 12, 30), (1, 8, 30), (0, 8, 29), (0, 8, 32), (0, 8), (8, 30)])
def test_split_keys_refuses_edges_inside_blocks(edges: tuple[int, ...]) -> None:
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 4, dtype=torch.bool), (8, 8), 8, 30)
    with pytest.raises(ValueError, match=r"do not cut 30 tokens at multiples of 8; align the shards"):
        mask.split_keys(edges)
