"""Selection, ring tables and merge in Triton against plain torch: compiled on GPUs, interpreted on CPUs."""

from __future__ import annotations

import pytest
import torch

from sp_sparse import SequenceParallelMesh, SparseAttention, SparseAttentionConfig, VideoGrid
from sp_sparse.parallel.merge import merge, merge_torch
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.registry import load_selector
from sp_sparse.selection.static import StaticBlocks, StaticPlans
from sp_sparse.selection.subblock_scores import part_sizes, subblock_scores, subblock_scores_torch
from sp_sparse.selection.summaries import block_scores, block_scores_torch
from sp_sparse.selection.topk import blocks_kept, select_rows_torch, select_topk
from tests.selection_cases import ROWS, SCORES, make_means, make_partials, make_parts, make_scores, make_static
from tests.triton_marks import needs_triton, on_gpu, run_interpreted
from tests.triton_oracle import poisoned_empty, random_mask, to_device


@needs_triton
def test_under_the_interpreter() -> None:
    run_interpreted("selection_interpreted.py")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@on_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (64, 5), (70, 129), (591, 591), (256, 256), (296, 1182)])
def test_scores_have_the_same_bits_everywhere(queries: int, keys: int, head_dim: int) -> None:
    query, key = make_means(queries, head_dim, 0), make_means(keys, head_dim, 1)
    expected = block_scores_torch(query, key)
    assert expected.isfinite().all()
    assert torch.equal(block_scores_torch(query.cuda(), key.cuda()).cpu(), expected)
    assert torch.equal(block_scores(query.cuda(), key.cuda()).cpu(), expected)
    assert torch.equal(block_scores(query.contiguous().cuda(), key.contiguous().cuda()).cpu(), expected)
    gathered = key.permute(2, 0, 1, 3).contiguous().movedim(0, 2)
    assert torch.equal(block_scores(query.cuda(), gathered.cuda()).cpu(), expected)


@on_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 130), (64, 1030), (4110, 9456), (320, 40000)])
def test_subblock_scores_have_the_same_bits_everywhere(queries: int, keys: int, head_dim: int) -> None:
    query, key = make_parts(queries, head_dim, 0), make_parts(keys, head_dim, 1)
    sizes = part_sizes(queries, 16), part_sizes(keys, 16)
    expected = subblock_scores_torch(query, key, *sizes)
    assert expected.isfinite().all()
    assert torch.equal(subblock_scores_torch(query.cuda(), key.cuda(), *sizes).cpu(), expected)
    assert torch.equal(subblock_scores(query.cuda(), key.cuda(), *sizes).cpu(), expected)
    gathered = key.permute(2, 0, 1, 3, 4).contiguous().movedim(0, 2)
    assert torch.equal(subblock_scores(query.cuda(), gathered.cuda(), *sizes).cpu(), expected)


@on_gpu
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("queries", "keys", "most", "keep"), [*ROWS, (591, 591, 5, 178), (256, 256, 256, 20)])
def test_rows_are_the_same_everywhere(queries: int, keys: int, most: int, keep: int, kind: str) -> None:
    scores, rows = make_scores(kind, queries, keys), make_static(queries, keys, most)
    static = StaticBlocks.of(rows.numpy(), torch.device("cuda"))
    expected, counts = select_rows_torch(scores, rows, static.counts.cpu(), keep, max(keep, static.most))
    on_cuda = select_rows_torch(scores.cuda(), static.rows, static.counts, keep, max(keep, static.most))
    mask = select_topk(scores.cuda(), static, keep / keys, (64, 64), queries * 64, keys * 64)
    used = torch.arange(expected.shape[3]) < counts.unsqueeze(-1)
    for indices, row_counts in (on_cuda, (mask.indices, mask.counts)):
        assert torch.equal(row_counts.cpu(), counts)
        assert torch.equal(indices.cpu()[used], expected[used])
    assert (mask.indices.cpu()[~used] == 0).all()


@on_gpu
@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (1000, (0, 512, 1000)),
        (1000, (0, 0, 64, 64, 960, 1000, 1000)),
        (40, (0, 40)),
        (75600, (0, 9472, 18944, 28416, 37888, 47360, 56832, 66304, 75600)),
        (75600, (0, 37888, 75600)),
        (479424, (0, 239744, 479424)),  # 7491 blocks
    ],
)
def test_split_tables_are_the_same_everywhere(length: int, edges: tuple[int, ...]) -> None:
    mask = random_mask(torch.Generator().manual_seed(0), 2, 3, (64, 64), 3000, length)
    for part, expected in zip(to_device(mask, "cuda").split_keys(edges), mask.split_keys(edges), strict=True):
        assert part.indices.shape == expected.indices.shape
        assert part.key_length == expected.key_length
        assert torch.equal(part.counts.cpu(), expected.counts)
        assert torch.equal(part.to_dense().cpu(), expected.to_dense())
        unused = torch.arange(part.indices.shape[3]) >= expected.counts.unsqueeze(-1)
        assert (part.indices.cpu()[unused] == 0).all()


@on_gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_merge_is_that_of_torch(head_dim: int, first: torch.dtype, dtype: torch.dtype | None) -> None:
    partials = make_partials(head_dim, (first, torch.bfloat16))
    exact_out, exact_lse, exact_new_out, exact_new_lse = (x.double() for x in partials)
    expected, expected_lse = merge_torch(exact_out, exact_lse, exact_new_out, exact_new_lse, torch.float64)
    out, lse, new_out, new_lse = (x.cuda() for x in partials)
    new_out = new_out.transpose(1, 2).contiguous().transpose(1, 2)
    new_lse = torch.nn.functional.pad(new_lse, (0, 7))[..., :-7]
    merged, total = merge(out, lse, new_out, new_lse, dtype)
    assert merged.dtype == (dtype or torch.float32)
    assert (merged.data_ptr() == out.data_ptr()) == (merged.dtype == first)
    tolerance = 1e-5 if dtype is None else 8e-3
    torch.testing.assert_close(merged.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.cpu().double(), expected_lse, rtol=1e-6, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("name", ["topk", "subblock"])
def test_a_long_video_selects_within_bounded_memory(name: str) -> None:
    """958 920 tokens, 7 492 blocks, 40 heads; beside the mask and the summaries at most 1.5 GB."""
    grid, blocks = VideoGrid(61, 131, 120), 7492
    config = SparseAttentionConfig(
        backend="triton", schedule="constant", topk=0.1, keep_first_frame=True, selector=name
    )
    selector, plans = load_selector(config), StaticPlans(config)
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (1, 40, blocks, 128) if name == "topk" else (1, 40, blocks, 4, 128)
    summaries = [torch.randn(shape, generator=generator, device="cuda") for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    static = plans.blocks(grid, (0, grid.num_tokens), torch.device("cuda"))
    request = SelectionRequest(1, 40, (0, grid.num_tokens), grid.num_tokens, 0.1, static, grid)
    mask = selector.select(summaries[0], summaries[1], request)
    table = (mask.indices.numel() + mask.counts.numel()) * 4
    assert torch.cuda.max_memory_allocated() - before - table < 1.5e9
    rows = slice(5000, 5003)
    some = summaries[0][:, :3, rows].cpu(), summaries[1][:, :3].cpu()
    if name == "topk":
        scores = block_scores_torch(*some)
    else:
        scores = subblock_scores_torch(*some, (3 * 4, 0.0), part_sizes(grid.num_tokens, 128))
    kept = static.rows[rows].cpu(), static.counts[rows].cpu()
    expected, counts = select_rows_torch(scores, *kept, blocks_kept(0.1, blocks), mask.indices.shape[3])
    assert torch.equal(mask.counts[:, :3, rows].cpu(), counts)
    used = torch.arange(expected.shape[3]) < counts.unsqueeze(-1)
    assert torch.equal(mask.indices[:, :3, rows].cpu()[used], expected[used])


@on_gpu
@pytest.mark.parametrize("selector", ["topk", "subblock", "window"])
def test_layer_captures_in_a_graph(selector: str) -> None:
    """A capture fails on a synchronisation with the host and on a copy from it."""
    config = SparseAttentionConfig(
        backend="triton", schedule="constant", topk=0.3, selector=selector, window=1, keep_first_frame=True
    )
    attention = SparseAttention(config, SequenceParallelMesh(), num_heads=4, head_dim=128)
    grid = VideoGrid(5, 17, 31)
    shape = (3, 1, grid.num_tokens, 4, 128)
    generator = torch.Generator(device="cuda").manual_seed(0)
    inputs, others = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
    first, second = attention(*inputs, grid=grid), attention(*others, grid=grid)
    assert not torch.equal(first, second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*inputs, grid=grid)
    graph.replay()
    assert torch.equal(out, first)
    inputs.copy_(others)
    graph.replay()
    assert torch.equal(out, second)
