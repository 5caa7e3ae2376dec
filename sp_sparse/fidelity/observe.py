"""Looking at block masks as they are made, and at the share of the true attention that they cover, on any mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sp_sparse import AttentionRecorder, SparseAttention
from sp_sparse.fidelity.mass import block_mass, block_tokens, covered_mass
from sp_sparse.mask import BlockMask
from sp_sparse.selection.base import SelectionRequest, Selector

# expert, layer, step
Place = tuple[int, int, int]

# Layers, steps and heads that are looked at, evenly spread: masses cost more than dense attention.
_MOST = 4


@dataclass(frozen=True)
class Seen:
    """Of one call, what this rank saw.

    Attributes:
        first_head, first_row: places of this rank's heads and query blocks among all of them.
        mask: bool `[H, Nq, Nk]`.
        covered: share of the attention of each query block, `[H, Nq]`.
        rows: tokens of each query block, `[Nq]`.
    """

    first_head: int
    first_row: int
    mask: NDArray[np.bool_]
    covered: NDArray[np.float64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Selection:
    queries: Tensor
    keys: Tensor
    mask: BlockMask
    request: SelectionRequest


class MaskObserver(AttentionRecorder):
    """Records as its base does, and looks at the first call of each chosen place: of two guided ones the caption's."""

    def __init__(self, layers: int, first_step: int, num_steps: int) -> None:
        """Steps from `first_step` on."""
        super().__init__()
        self._made: dict[tuple[int, int], SparseAttention] = {}
        self._layers = set(spread(0, layers))
        self._steps = set(spread(first_step, num_steps))
        self._held: dict[tuple[int, int], list[_Selection]] = {}
        self.seen: dict[Place, Seen] = {}

    def watch(self, layers: Sequence[SparseAttention]) -> None:
        """Look at what these layers select from now on."""
        for layer in layers:
            place = (layer.expert, layer.layer)
            self._made[place], held = layer, self._held.setdefault(place, [])
            layer.selector = _ObservedSelector(layer.selector, layer.config.block_size, held)

    def record(self, expert: int, layer: int, step: int | None, masks: Sequence[BlockMask | None], kernel: str) -> None:
        super().record(expert, layer, step, masks, kernel)
        held = self._held[expert, layer]
        if step in self._steps and layer in self._layers and held and (expert, layer, step) not in self.seen:
            assert step is not None
            self.seen[expert, layer, step] = self._look(self._made[expert, layer], held)
        held.clear()

    def _look(self, layer: SparseAttention, held: Sequence[_Selection]) -> Seen:
        heads = layer.strategy.heads(layer.num_heads)
        masks, covered = [], []
        for chosen in held:  # one a chunk of this rank's heads
            mass = block_mass(chosen.queries, chosen.keys, chosen.request.query_length, chosen.request.key_length)
            masks.append(chosen.mask.to_dense()[0])
            covered.append(covered_mass(mass, chosen.mask)[0])
        first, last = held[0].request.query_range
        block = layer.config.block_size[0]
        starts = np.arange(first, last, block)
        return Seen(
            sum(heads[: layer.mesh.ulysses_rank]),
            first // block,
            torch.cat(masks).cpu().numpy(),
            torch.cat(covered).cpu().numpy(),
            np.minimum(starts + block, last) - starts,
        )


class _ObservedSelector:
    """Selects as `inner` does; the tokens travel with its summaries, for only so are they together on every mesh."""

    def __init__(self, inner: Selector, block_size: tuple[int, int], held: list[_Selection]) -> None:
        self._inner, self._block_size, self._held = inner, block_size, held

    def summarize_queries(self, query: Tensor) -> Tensor:
        self._queries = _Packing.of(self._inner.summarize_queries(query), block_tokens(query, self._block_size[0]))
        return self._queries.packed

    def summarize_keys(self, key: Tensor) -> Tensor:
        self._keys = _Packing.of(self._inner.summarize_keys(key), block_tokens(key, self._block_size[1]))
        return self._keys.packed

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        assert queries is not None, "made by summarize_queries"
        assert keys is not None, "made by summarize_keys"
        query_summaries, query_tokens = self._queries.unpack(queries)
        key_summaries, key_tokens = self._keys.unpack(keys)
        mask = self._inner.select(query_summaries, key_summaries, request)
        self._held.append(_Selection(query_tokens, key_tokens, mask, request))
        return mask


@dataclass(frozen=True, eq=False)
class _Packing:
    """Several tensors `[B, H, N, ...]`, the first perhaps None, as the bytes of one."""

    packed: Tensor
    shapes: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]

    @classmethod
    def of(cls, *tensors: Tensor | None) -> _Packing:
        given = [x for x in tensors if x is not None]
        packed = torch.cat([x.flatten(3).contiguous().view(torch.uint8) for x in given], dim=-1)
        return cls(packed, tuple(None if x is None else (tuple(x.shape[3:]), x.dtype) for x in tensors))

    def unpack(self, packed: Tensor) -> tuple[Any, ...]:
        """The tensors of what may have more blocks than `self.packed`."""
        found: list[Tensor | None] = []
        start = 0
        for shape in self.shapes:
            if shape is None:
                found.append(None)
                continue
            size, dtype = shape
            stop = start + int(np.prod(size)) * dtype.itemsize
            found.append(packed[..., start:stop].clone().view(dtype).unflatten(-1, size))
            start = stop
        return tuple(found)


def assemble(parts: Sequence[Mapping[Place, Seen]], num_heads: int) -> dict[str, NDArray[Any]]:
    """What the ranks that share a sequence saw, put together.

    Returns:
        `places` `[P, 3]` (expert, layer, step), `heads` (those of `masks`), `masks` bool `[P, heads, Nq, Nk]`, `covered`
        `[P, H]`: the share of the attention of each head that its mask covers.
    """
    places = sorted({place for part in parts for place in part})
    heads = spread(0, num_heads)
    masks, covered = [], []
    for place in places:
        seen = [part[place] for part in parts if place in part]
        rows = max(one.first_row + len(one.rows) for one in seen)
        whole = np.zeros((num_heads, rows, seen[0].mask.shape[2]), dtype=np.bool_)
        sums, tokens = np.zeros(num_heads), np.zeros(num_heads)
        for one in seen:
            of_heads = slice(one.first_head, one.first_head + len(one.mask))
            whole[of_heads, one.first_row : one.first_row + len(one.rows)] = one.mask
            sums[of_heads] += one.covered @ one.rows
            tokens[of_heads] += one.rows.sum()
        masks.append(whole[heads])
        covered.append(sums / tokens)
    return {
        "places": np.array(places, dtype=np.int64).reshape(-1, 3),
        "heads": np.array(heads),
        "masks": np.array(masks, dtype=np.bool_),
        "covered": np.array(covered),
    }


def spread(first: int, last: int) -> list[int]:
    """At most four numbers of `[first, last)`, its ends among them, evenly spread."""
    return sorted(set(np.linspace(first, last - 1, min(_MOST, max(last - first, 0))).round().astype(int).tolist()))
