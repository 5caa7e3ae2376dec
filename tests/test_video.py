"""Token orders: permutations that keep neighbours close, each in the way it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sp_sparse.video import TILE, TOKEN_ORDERS, VideoGrid, inverse_order, token_order

grids = st.builds(VideoGrid, st.integers(1, 11), st.integers(1, 11), st.integers(1, 19))


def _places(grid: VideoGrid, order: str) -> NDArray[np.int64]:
    """(t, h, w) of each token of the sequence, `[S, 3]`."""
    return np.stack(np.unravel_index(token_order(grid, order), grid.shape), 1)


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@given(grid=grids)
def test_permutation_and_inverse(order: str, grid: VideoGrid) -> None:
    permutation = token_order(grid, order)
    assert permutation.dtype == np.int64
    assert np.array_equal(np.sort(permutation), np.arange(grid.num_tokens))
    inverse = inverse_order(permutation)
    assert np.array_equal(permutation[inverse], np.arange(grid.num_tokens))
    assert np.array_equal(inverse[permutation], np.arange(grid.num_tokens))


def test_raster_is_the_identity() -> None:
    assert np.array_equal(token_order(VideoGrid(3, 4, 5), "raster"), np.arange(60))


@given(grid=grids)
def test_tile_boxes_are_contiguous_and_raster_within(grid: VideoGrid) -> None:
    places = _places(grid, "tile")
    boxes = places // np.array(TILE)
    starts = np.flatnonzero(np.r_[True, (boxes[1:] != boxes[:-1]).any(1)])
    counts = np.ceil(np.array(grid.shape) / np.array(TILE)).astype(int)
    assert len(starts) == counts.prod(), "each box is visited once, in one piece"
    numbers = np.ravel_multi_index(tuple(boxes[starts].T), tuple(counts))
    assert np.array_equal(numbers, np.arange(len(starts))), "boxes in raster order"
    raster = token_order(grid, "tile")
    for first, end in zip(starts, [*starts[1:], len(places)], strict=True):
        assert (np.diff(raster[first:end]) > 0).all()


def test_whole_tiles_are_whole_blocks_of_128() -> None:
    places = _places(VideoGrid(8, 8, 16), "tile").reshape(-1, 128, 3)
    assert ((places.max(1) - places.min(1)) == np.array(TILE) - 1).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_moves_by_one_through_a_power_of_two_cube(side: int) -> None:
    places = _places(VideoGrid(side, side, side), "hilbert")
    assert places[0].tolist() == [0, 0, 0]
    assert (np.abs(np.diff(places, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("side", [4, 8])
def test_hilbert_fills_each_octant_before_the_next(side: int) -> None:
    octants = _places(VideoGrid(side, side, side), "hilbert") // (side // 2)
    assert ((octants[1:] != octants[:-1]).any(1)).sum() == 7


@given(grid=grids)
def test_hilbert_of_any_grid_is_the_cubes_curve_without_what_lies_outside(grid: VideoGrid) -> None:
    side = 1 << (max(grid.shape) - 1).bit_length()
    cube = _places(VideoGrid(side, side, side), "hilbert")
    inside = cube[(cube < np.array(grid.shape)).all(1)]
    assert np.array_equal(_places(grid, "hilbert"), inside)


def test_orders_are_shared_and_read_only() -> None:
    permutation = token_order(VideoGrid(2, 2, 2), "hilbert")
    with pytest.raises(ValueError, match="read-only"):
        permutation[0] = 1


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, -1, 4), (4, 4, 0)])
def test_empty_grid(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="has an empty side; every side must be at least 1"):
        VideoGrid(*shape)


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match="unknown token order 'spiral'; use one of raster, tile, hilbert"):
        token_order(VideoGrid(2, 2, 2), "spiral")
