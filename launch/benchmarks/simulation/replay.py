"""One call of the layer on a mesh, rank by rank: who waits for whom as the code has it, with modelled times.

Left out: the host, which is taken to be ahead of the GPU, and the remainder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.benchmarks.simulation.costs import Costs, Link
from launch.benchmarks.simulation.work import LayerSize, TileMap, Tiles, ring_edges
from sp_sparse.parallel.ring import ring_buffers
from sp_sparse.parallel.shards import SequenceShards, split_evenly

# How ring ranks come by keys and values: a shard a hop, as far ahead of attention as there is room; all shards at once.
# A mesh may name "pruned" as well, which the library has not: as the latter, but only blocks that masks choose are sent.
EXCHANGES = ("ring", "all_gather")

Times = NDArray[Any]  # float64


@dataclass(frozen=True)
class Mesh:
    """Ranks that share one sequence; `rank = ring_rank * ulysses + ulysses_rank`.

    Attributes:
        exchange: one of EXCHANGES, or "pruned".
        buffers: shards of others that a rank of a ring holds at most; None: as many as the code's.
    """

    ulysses: int
    ring: int = 1
    exchange: str = "ring"
    buffers: int | None = None

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"U{self.ulysses}×R{self.ring}" + (f" {self.exchange}" if self.ring > 1 else "")


@dataclass(frozen=True)
class Cluster:
    """Which link is between two ranks.

    Attributes:
        inside, across: within a node, and between nodes.
        node: ranks of a node.
    """

    inside: Link
    across: Link
    node: int = 8

    def send_ms(self, rank: int, sent: dict[int, float], exchanges: int = 1) -> float:
        """To send so many bytes to each of these ranks: each link takes its own at once."""
        near = sum(nbytes for peer, nbytes in sent.items() if peer // self.node == rank // self.node)
        far = sum(sent.values()) - near
        return max(self.inside.ms(near, exchanges), self.across.ms(far, exchanges) if far else 0.0)


@dataclass(frozen=True)
class Replay:
    """Of every rank, milliseconds.

    Attributes:
        ends: when a rank has its output.
        kernels: what it attends, without waiting.
    """

    ends: Times
    kernels: Times

    @property
    def ms(self) -> float:
        return float(self.ends.max())


class Layer:
    """Calls of one layer under one mask."""

    def __init__(self, size: LayerSize, costs: Costs, mask: NDArray[np.bool_] | None) -> None:
        """`mask`: `[H, Nq, Nk]`, of any size; None for dense attention."""
        self.size, self.costs = size, costs
        self._map = None if mask is None else TileMap(mask, size)
        self._tiles: dict[int, Tiles] = {}

    def replay(self, mesh: Mesh, cluster: Cluster) -> Replay:
        """One call.

        Raises:
            ValueError: fewer heads than Ulysses ranks.
        """
        if mesh.ulysses > self.size.heads:
            raise ValueError(f"{mesh}: {self.size.heads} heads cannot be split over {mesh.ulysses} ranks; use fewer")
        if mesh.ring == 1:
            return _Ulysses(self, mesh, cluster).replay()
        return _Ring(self, mesh, cluster).replay()

    def imbalance(self, mesh: Mesh) -> float:
        """ρ: the slowest rank's attention, with its waiting for other ranks, over the mean attention of all.

        Nothing but the kernels takes time here, so that links and merging are left out.
        """
        free = replace(
            self.costs,
            means_gb_per_s=math.inf,
            pair_ns=0.0,
            memory_gb_per_s=math.inf,
            launch_us=0.0,
            exchange_share=0.0,
        )
        link = Link("none", math.inf, 0.0, measured=False)
        alone = copy(self)
        alone.costs = free
        found = alone.replay(mesh, Cluster(link, link))
        return found.ms / float(found.kernels.mean())

    def barrier_imbalance(self, ring_degree: int) -> float:
        """What ρ would be if all ranks of a ring waited for the slowest at every hop: tiles alone."""
        work, ranks = self.tiles(ring_degree).sum(0), np.arange(ring_degree)
        hops = [work[ranks, (ranks - hop) % ring_degree] for hop in range(ring_degree)]
        return float(sum(hop.max() for hop in hops) / sum(hop.mean() for hop in hops))

    def tiles(self, ring_degree: int) -> Tiles:
        """`[H, R, R]`: of each head, query shard and key shard."""
        if ring_degree not in self._tiles:
            edges = ring_edges(self.size, ring_degree)
            if self._map is None:
                blocks = np.diff(edges) / self.size.block
                self._tiles[ring_degree] = np.broadcast_to(
                    np.outer(blocks, blocks), (self.size.heads, ring_degree, ring_degree)
                )
            else:
                self._tiles[ring_degree] = self._map.tiles(edges)
        return self._tiles[ring_degree]

    def needed(self, ring_degree: int) -> Tiles:
        """`[H, R, R]`: of each head, query shard and key shard, the share of the keys that are attended at all.

        Raises:
            ValueError: dense attention.
        """
        if self._map is None:
            raise ValueError("dense attention chooses every key block, so none can be pruned; use another exchange")
        return self._map.needed(ring_edges(self.size, ring_degree))

    @property
    def dense(self) -> bool:
        return self._map is None

    def attend_ms(self, tiles: float, rows: float) -> float:
        """One call of the kernel."""
        if self.dense:
            return tiles * self.costs.dense_tile_ns * 1e-6 + self.costs.launch_us * 1e-3
        return self.costs.kernel_ms(tiles, rows)

    def select_ms(self, rows: float, query_tokens: float, heads: float) -> float:
        return 0.0 if self.dense else self.costs.selection_ms(self.size, rows, query_tokens, heads)


class _Ulysses:
    """Without a ring: heads in two chunks, one on its way while the other is attended; on one rank nothing moves."""

    def __init__(self, layer: Layer, mesh: Mesh, cluster: Cluster) -> None:
        self._layer, self._cluster, self._ranks = layer, cluster, mesh.ulysses
        heads = split_evenly(layer.size.heads, mesh.ulysses)
        chunks = 1 if mesh.ulysses == 1 else min(2, *heads)
        # Of each chunk, the heads of each rank.
        self._chunks = list(zip(*(split_evenly(count, chunks) for count in heads), strict=True))
        self._first = np.cumsum((0, *heads))
        self._tokens = np.diff(SequenceShards.aligned(layer.size.tokens, layer.size.block, mesh.ulysses, 1).edges)

    def replay(self) -> Replay:
        size, layer, free = self._layer.size, self._layer, np.zeros(self._ranks)
        tiles = layer.tiles(1)[:, 0, 0]
        attended, gathered, returned = free.copy(), self._arrive(0, free), free.copy()
        side, kernels = gathered, free.copy()
        for number, heads in enumerate(self._chunks):
            start = np.maximum(attended, gathered)
            under = np.stack([start, np.maximum(start, side)])  # the exchange that goes on meanwhile
            if number + 1 < len(self._chunks):
                gathered = side = self._arrive(number + 1, under[1])
                under[1] = gathered
            for rank, count in enumerate(heads):
                own = self._first[rank] + sum(chunk[rank] for chunk in self._chunks[:number])
                rows = count * size.blocks
                kernel = layer.attend_ms(float(tiles[own : own + count].sum()), rows)
                kernels[rank] += kernel
                begun = start[rank] + layer.select_ms(rows, size.tokens, count)
                attended[rank] = begun + layer.costs.slowed_ms(kernel, begun, (under[0, rank], under[1, rank]))
            returned = side = self._return(number, np.maximum(attended, side))
        return Replay(returned, kernels)

    def _arrive(self, chunk: int, start: Times) -> Times:
        """When the chunk's query, key and value are there: packed, then exchanged by all ranks at once."""
        if self._ranks == 1:
            return start
        packed = [
            at + self._layer.costs.copy_ms(3 * self._bytes(rank, sum(self._chunks[chunk])), 3 * self._ranks)
            for rank, at in enumerate(start)
        ]
        return max(packed) + self._exchange_ms(chunk, 3)

    def _return(self, chunk: int, start: Times) -> Times:
        """When the chunk's output is back in its place."""
        if self._ranks == 1:
            return start
        arrived = start.max() + self._exchange_ms(chunk, 1)
        copies = [
            self._layer.costs.copy_ms(self._bytes(r, sum(self._chunks[chunk])), self._ranks) for r in range(self._ranks)
        ]
        ends: Times = arrived + np.array(copies)
        return ends

    def _exchange_ms(self, chunk: int, tensors: int) -> float:
        """A rank gives away others' heads of its tokens and receives others' tokens of its heads; the busiest one counts."""
        heads, ranks, longest = self._chunks[chunk], range(self._ranks), 0.0
        for rank in ranks:
            peers = [peer for peer in ranks if peer != rank]
            sent = {peer: tensors * self._bytes(rank, heads[peer]) for peer in peers}
            received = {peer: tensors * self._bytes(peer, heads[rank]) for peer in peers}
            longest = max(longest, self._cluster.send_ms(rank, sent), self._cluster.send_ms(rank, received))
        return longest

    def _bytes(self, rank: int, heads: float) -> float:
        return self._layer.size.token_bytes(float(self._tokens[rank]), heads)


class _Ring:
    """A ring, perhaps of Ulysses groups: query, key and value travel within the group first, all heads at once."""

    def __init__(self, layer: Layer, mesh: Mesh, cluster: Cluster) -> None:
        self._layer, self._mesh, self._cluster = layer, mesh, cluster
        self._tokens: Times = np.diff(np.array(ring_edges(layer.size, mesh.ring), dtype=np.float64))
        self._heads = split_evenly(layer.size.heads, mesh.ulysses)
        self._rows: Times = np.ceil(self._tokens / layer.size.block)

    def replay(self) -> Replay:
        """The ring of each Ulysses rank by itself; groups meet before and after."""
        mesh, size = self._mesh, self._layer.size
        tiles, firsts = self._layer.tiles(mesh.ring), np.cumsum((0, *self._heads))
        shape = mesh.ulysses, mesh.ring
        ends, kernels = np.zeros(shape), np.zeros(shape)
        before = np.array([self._group_ms(r, 3) for r in range(mesh.ring)])
        after = np.array([self._group_ms(r, 1) for r in range(mesh.ring)])
        for u, heads in enumerate(self._heads):
            shards = zip(self._rows, self._tokens, strict=True)
            selected: Times = before + np.array([self._layer.select_ms(n * heads, held, heads) for n, held in shards])
            if not self._layer.dense:
                # Key means are gathered over the ring, which no rank leaves before the last has come.
                selected = np.full(mesh.ring, selected.max() + self._gather_means_ms(heads))
            work = tiles[firsts[u] : firsts[u + 1]].sum(0)
            ends[u], kernels[u] = self._attending(slice(firsts[u], firsts[u + 1]), work, u).run(
                selected, size.token_bytes(1, heads) * self._tokens, heads * size.head_dim * self._tokens
            )
        return Replay((ends.max(0) + after).repeat(mesh.ulysses), kernels.T.ravel())

    def _attending(self, heads: slice, work: Tiles, ulysses_rank: int) -> _AllGather | _Hops:
        mesh, rows, send_ms = self._mesh, self._rows * (heads.stop - heads.start), self._sender(ulysses_rank)
        if mesh.exchange == "pruned":
            return _Pruned(self._layer, rows, work, send_ms, self._layer.needed(mesh.ring)[heads].mean(0))
        if mesh.exchange == "all_gather":
            return _AllGather(self._layer, rows, work, send_ms)
        return _Hops(self._layer, rows, work, send_ms, mesh.buffers or ring_buffers(mesh.ring))

    def _sender(self, ulysses_rank: int) -> Callable[[int, dict[int, float], int], float]:
        """(ring rank, bytes to each ring rank, exchanges) -> ms."""

        def send_ms(rank: int, sent: dict[int, float], exchanges: int) -> float:
            peers = {peer * self._mesh.ulysses + ulysses_rank: nbytes for peer, nbytes in sent.items()}
            return self._cluster.send_ms(rank * self._mesh.ulysses + ulysses_rank, peers, exchanges)

        return send_ms

    def _group_ms(self, ring_rank: int, tensors: int) -> float:
        """Of the Ulysses group: tensors one after another, packed and sent, or sent and unpacked."""
        degree, size = self._mesh.ulysses, self._layer.size
        if degree == 1:
            return 0.0
        tokens, first = float(self._tokens[ring_rank]) / degree, ring_rank * degree
        most = max(self._heads)
        sent = {first + peer: size.token_bytes(tokens, most) for peer in range(1, degree)}
        exchange = self._cluster.send_ms(first, sent)
        return tensors * (exchange + self._layer.costs.copy_ms(size.token_bytes(tokens, size.heads), degree))

    def _gather_means_ms(self, heads: int) -> float:
        nbytes = self._layer.size.head_dim * 2 * heads * float(self._rows.max())
        ring = self._mesh.ring
        return max(
            self._sender(0)(rank, dict.fromkeys([(rank + 1) % ring], nbytes * (ring - 1)), 1) for rank in range(ring)
        )


@dataclass(frozen=True)
class _Attending:
    """What ring ranks attend.

    Attributes:
        rows: query blocks x heads of each rank.
        work: tiles `[R, R]` of each rank and key shard.
        send_ms: (ring rank, bytes to each ring rank, exchanges) -> ms.
    """

    layer: Layer
    rows: Times
    work: Tiles
    send_ms: Callable[[int, dict[int, float], int], float]

    def _kernels_ms(self, tiles: Times) -> Times:
        """Of one call on each rank."""
        return np.array([self.layer.attend_ms(*call) for call in zip(tiles, self.rows, strict=True)])

    def _slowed(self, kernels: Times, start: Times, exchanges: Sequence[tuple[Times, Times]]) -> Times:
        """Those kernels, with exchanges (from, to) under them."""
        return np.array(
            [
                self.layer.costs.slowed_ms(kernel, start[rank], *((a[rank], b[rank]) for a, b in exchanges))
                for rank, kernel in enumerate(kernels)
            ]
        )


@dataclass(frozen=True)
class _Hops(_Attending):
    """A shard a hop (`sp_sparse/parallel/ring.py`).

    Attributes:
        buffers: shards of others that a rank holds at most.
    """

    buffers: int

    def run(self, start: Times, shard: Times, elements: Times) -> tuple[Times, Times]:
        """When each rank has attended every shard, and the kernels' time.

        Args:
            start: when each rank has its mask.
            shard: bytes of each rank's keys, or values.
            elements: of each rank's output.
        """
        last = len(start) - 1
        ranks = np.arange(len(start))
        attended, arrived, kernels = start, start, np.zeros_like(start)
        exchanges: list[tuple[Times, Times]] = []  # by hop: when a rank is ready for it, and when it is over
        for hop in range(len(start)):
            while len(exchanges) < min(max(hop - 1, 0) + self.buffers, last):
                # Behind the exchange before it, and behind what was attended from the buffer that it fills.
                ready = np.maximum(attended, exchanges[-1][1]) if exchanges else attended
                exchanges.append((ready, _with_neighbours(ready) + self._hop_ms(len(exchanges), shard)))
            if hop:
                arrived = exchanges[hop - 1][1]
            beginning = np.maximum(attended, arrived)
            kernel = self._kernels_ms(self.work[ranks, (ranks - hop) % len(ranks)])
            kernels = kernels + kernel
            attended = beginning + self._slowed(kernel, beginning, exchanges)
            if hop:
                attended = attended + [self.layer.costs.merge_ms(n, hop == 1, hop == last) for n in elements]
        return attended, kernels

    def _hop_ms(self, hop: int, shard: Times) -> Times:
        """A rank is done when it has sent and received: keys, then values."""
        ranks = len(shard)
        sent = np.array(
            [self.send_ms(rank, {(rank + 1) % ranks: 2 * shard[(rank - hop) % ranks]}, 2) for rank in range(ranks)]
        )
        return np.maximum(sent, np.roll(sent, 1))


class _AllGather(_Attending):
    def run(self, start: Times, shard: Times, elements: Times) -> tuple[Times, Times]:
        """As `_Hops.run`: the own shard while the others arrive, then all of those in one call."""
        begun = np.full_like(start, start.max())
        arrived = self._arrive(begun, shard)
        own = self.work.diagonal()
        if self.layer.dense:
            every = self._kernels_ms(self.work.sum(1))
            return arrived + every, every
        first, others = self._kernels_ms(own), self._kernels_ms(self.work.sum(1) - own)
        merged = np.array([self.layer.costs.merge_ms(n, first=True, last=True) for n in elements])
        ends: Times = np.maximum(start + self._slowed(first, start, [(begun, arrived)]), arrived) + others + merged
        return ends, first + others

    def _arrive(self, begun: Times, shard: Times) -> Times:
        """When each rank has the others' keys and values."""
        ranks = range(len(shard))
        return begun + max(self.send_ms(r, {p: 2 * shard[r] for p in ranks if p != r}, 1) for r in ranks)


@dataclass(frozen=True)
class _Pruned(_AllGather):
    """As a prototype has it (`launch/prototypes/pruned_keys.py`). That the host waits for the lists costs nothing here.

    Attributes:
        needed: `[R, R]`, the share of each key shard that each query shard attends.
    """

    needed: Tiles

    def _arrive(self, begun: Times, shard: Times) -> Times:
        """Lists first; then keys and values are packed, sent, and put in their places, one after the other."""
        ranks, costs = range(len(shard)), self.layer.costs
        moved = 2 * self.needed * shard * (1 - np.eye(len(shard)))  # bytes, to each rank and from each
        lists = max(self.send_ms(r, dict.fromkeys((p for p in ranks if p != r), 0.0), 1) for r in ranks)
        sent = [self.send_ms(r, {p: float(moved[p, r]) for p in ranks if p != r}, 2) for r in ranks]
        received = [self.send_ms(r, {p: float(moved[r, p]) for p in ranks if p != r}, 2) for r in ranks]
        packed = max(costs.copy_ms(nbytes, 2) for nbytes in moved.sum(0))
        unpacked = np.array([costs.copy_ms(nbytes, 2) for nbytes in moved.sum(1)])
        found: Times = begun + lists + packed + max(*sent, *received) + unpacked
        return found


def _with_neighbours(times: Times) -> Times:
    """An exchange begins when the ranks before and after have come, too."""
    return np.maximum(times, np.maximum(np.roll(times, 1), np.roll(times, -1)))
