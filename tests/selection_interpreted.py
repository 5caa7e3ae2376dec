"""Selection and merge in Triton under its interpreter; `test_selection_triton.py` runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_sparse.parallel.merge import merge_torch
from sp_sparse.parallel.triton_merge import merge_triton
from sp_sparse.selection import summaries, triton_subblock
from sp_sparse.selection.subblock_scores import WEIGHT_BITS, part_sizes, score_factor, subblock_scores_torch
from sp_sparse.selection.topk import select_rows_torch
from sp_sparse.selection.triton_scores import block_scores_triton
from sp_sparse.selection.triton_subblock import subblock_scores_triton
from sp_sparse.selection.triton_topk import select_rows_triton
from sp_sparse.triton_split import split_rows_triton
from tests.selection_cases import ROWS, SCORES, make_means, make_partials, make_parts, make_scores, make_static
from tests.triton_oracle import poisoned_empty, random_mask

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 129), (64, 5)])
def test_scores_equal_torch(queries: int, keys: int, head_dim: int) -> None:
    query, key = make_means(queries, head_dim, 0), make_means(keys, head_dim, 1)
    expected = summaries.block_scores_torch(query, key)
    assert expected.isfinite().all()
    limits = summaries.SCORE_BITS, summaries.LARGEST, summaries.LEAST_EXPONENT
    assert torch.equal(block_scores_triton(query, key, *limits), expected)
    assert torch.equal(block_scores_triton(query.contiguous(), key.contiguous(), *limits), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 130), (20, 1030)])
def test_subblock_scores_equal_torch(queries: int, keys: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full blocks, parts that are short or empty; fewer columns than a program reads at a time, and more."""
    monkeypatch.setattr(triton_subblock, "_WIDTH", 32)
    query, key = (
        make_parts(queries, head_dim, 0),
        make_parts(keys, head_dim, 1).transpose(1, 2).contiguous().transpose(1, 2),
    )
    sizes = part_sizes(queries, 16), part_sizes(keys, 16)
    expected = subblock_scores_torch(query, key, *sizes)
    assert expected.isfinite().all()
    limits = summaries.SCORE_BITS, summaries.LARGEST, summaries.LEAST_EXPONENT
    scores = subblock_scores_triton(query, key, *sizes, score_factor(head_dim), limits, WEIGHT_BITS)
    assert torch.equal(scores.view(torch.int32), expected.view(torch.int32))


def test_subblock_scores_of_nothing() -> None:
    query, key = torch.zeros(1, 2, 0, 4, 64), torch.zeros(1, 2, 3, 4, 64)
    limits = summaries.SCORE_BITS, summaries.LARGEST, summaries.LEAST_EXPONENT
    assert subblock_scores_triton(query, key, (0, 0.0), (12, 0.0), 1.0, limits, WEIGHT_BITS).shape == (1, 2, 0, 3)


def check_rows(scores: torch.Tensor, static: torch.Tensor, keep: int) -> None:
    counts = static.sum(1, dtype=torch.int32)
    width = max(keep, int(counts.max()))
    expected, expected_counts = select_rows_torch(scores, static, counts, keep, width)
    indices, row_counts = select_rows_triton(scores, static, counts, keep, width)
    assert torch.equal(row_counts, expected_counts)
    used = torch.arange(width) < row_counts.unsqueeze(-1)
    assert torch.equal(indices[used], expected[used])
    assert (indices[~used] == 0).all()
    # The definition, without keys: by static first, then score, then number.
    for row in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        values, kept = scores[tuple(row)].tolist(), static[row[2]].tolist()
        order = sorted(range(len(values)), key=lambda number: (not kept[number], -values[number], number))
        count = int(row_counts[tuple(row)])
        assert indices[tuple(row)][:count].tolist() == sorted(order[:count])


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("queries", "keys", "most", "keep"), ROWS)
def test_rows_equal_torch(queries: int, keys: int, most: int, keep: int, kind: str) -> None:
    check_rows(make_scores(kind, queries, keys), make_static(queries, keys, most), keep)


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(data=st.data(), keys=st.integers(1, 40), seed=st.integers(0, 1000))
def test_any_rows_equal_torch(data: st.DataObject, keys: int, seed: int) -> None:
    values = st.one_of(st.sampled_from([0.0, -0.0, 1.0]), st.floats(width=32, allow_nan=False))
    scores = torch.tensor(data.draw(st.lists(values, min_size=2 * keys, max_size=2 * keys))).view(1, 1, 2, keys)
    static = make_static(2, keys, data.draw(st.integers(0, keys)), seed)
    check_rows(scores, static, data.draw(st.integers(1, keys)))


@pytest.mark.parametrize(
    ("length", "edges"),
    [(1000, (0, 512, 1000)), (1000, (0, 0, 64, 64, 960, 1000, 1000)), (40, (0, 40)), (640, (0, 256, 640))],
)
def test_split_tables_equal_torch(length: int, edges: tuple[int, ...]) -> None:
    mask = random_mask(torch.Generator().manual_seed(0), 2, 3, (64, 64), 300, length)
    blocks = [-(-edge // 64) for edge in edges]
    wide = torch.nn.functional.pad(mask.indices, (0, 3))[..., :-3]
    for indices in (mask.indices, wide):
        parts = split_rows_triton(indices, mask.counts, blocks)
        for (table, counts), expected in zip(parts, mask.split_keys(edges), strict=True):
            assert table.shape == expected.indices.shape
            assert torch.equal(counts, expected.counts)
            used = torch.arange(table.shape[3]) < counts.unsqueeze(-1)
            assert torch.equal(table[used], expected.indices[used])
            assert (table[~used] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float16)])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_merge_is_that_of_torch(head_dim: int, dtypes: tuple[torch.dtype, torch.dtype], dtype: torch.dtype) -> None:
    out, lse, new_out, new_lse = make_partials(head_dim, dtypes)
    new_out = new_out.transpose(1, 2).contiguous().transpose(1, 2)
    new_lse = torch.nn.functional.pad(new_lse, (0, 7))[..., :-7]
    expected, expected_lse = merge_torch(out.clone(), lse, new_out, new_lse, dtype)
    merged, total = merge_triton(out, lse, new_out, new_lse, dtype)
    assert (merged.data_ptr() == out.data_ptr()) == (dtype == dtypes[0])
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(total, expected_lse)
