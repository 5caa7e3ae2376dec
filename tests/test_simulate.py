"""`benchmark simulate`: how masks are stretched, who waits for whom, how bytes take their way, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch.benchmarks.command import main
from launch.benchmarks.results import read_results
from launch.benchmarks.simulation.check import check
from launch.benchmarks.simulation.costs import Costs, Link, fit, read_rows
from launch.benchmarks.simulation.replay import Cluster, Layer, Mesh
from launch.benchmarks.simulation.work import LayerSize, TileMap, ring_edges
from sp_sparse.generate.recorded_masks import RecordedMasks
from sp_sparse.parallel import ring as ring_module
from sp_sparse.parallel.streams import SideStream

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs/benchmarks/2026-11-25_h200x2_scaling"

FREE = Link("free", float("inf"), 0.0, measured=False)
# A tile takes a millisecond, and nothing else any time.
COSTS = Costs(
    tile_ns=1e6, row_ns=0.0, dense_tile_ns=2e6, means_gb_per_s=np.inf, pair_ns=0.0, memory_gb_per_s=np.inf, launch_us=0.0,
    exchange_share=0.0, nvlink=FREE, multiprocessors=1,
)  # fmt: skip
AT_ONCE = Cluster(FREE, FREE)


def _layer(mask: list[list[int]], heads: int = 1, costs: Costs = COSTS) -> Layer:
    dense = np.array(mask, dtype=np.bool_)[None]
    return Layer(LayerSize(len(mask) * 128, heads), costs, dense)


def test_shards_at_recorded_blocks_hold_their_very_tiles() -> None:
    mask = np.random.default_rng(0).random((3, 12, 12)) < 0.4
    size = LayerSize(12 * 128 - 40, 6)
    edges = ring_edges(size, 3)
    assert edges == (0, 512, 1024, 1496)
    # The last block is short: places are shares of the tokens, so the cut is near to the blocks' own.
    whole = TileMap(mask, replace(size, tokens=12 * 128)).tiles((0, 512, 1024, 1536))
    expected = mask.reshape(3, 3, 4, 3, 4).sum((2, 4))
    np.testing.assert_allclose(whole, np.concatenate([expected, expected]), rtol=1e-12)  # heads are repeated
    np.testing.assert_allclose(TileMap(mask, size).tiles(edges).sum((1, 2)), mask.sum((1, 2)).tolist() * 2)


def test_a_recording_is_stretched_over_a_longer_sequence() -> None:
    mask = np.eye(4, dtype=np.bool_)[None]
    found = TileMap(mask, LayerSize(40 * 128, 1)).tiles((0, 10 * 128, 15 * 128, 40 * 128))
    # A recorded block is 10 x 10 of the layer's; half of the second one's queries attend its keys in each half alike.
    np.testing.assert_allclose(found[0], [[100, 0, 0], [0, 25, 25], [0, 25, 225]])


def test_a_ring_waits_for_its_neighbours_where_room_ends() -> None:
    """Rank 0 has all of its work in the first hop, the others theirs in the last."""
    layer = _layer([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]], heads=4)
    # Room for two of three: the exchange of the last hop fills a buffer which rank 0 attends behind its first hop.
    waiting = layer.replay(Mesh(1, 4, buffers=2), AT_ONCE)
    np.testing.assert_allclose(waiting.kernels, 4.0)
    np.testing.assert_allclose(waiting.ends, [4.0, 8.0, 4.0, 8.0])
    for mesh in (Mesh(1, 4, "ring"), Mesh(1, 4, "all_gather")):
        np.testing.assert_allclose(layer.replay(mesh, AT_ONCE).ends, 4.0)
    assert layer.imbalance(Mesh(1, 4, buffers=2)) == pytest.approx(2.0)
    assert layer.barrier_imbalance(4) == pytest.approx(2.0)
    assert layer.imbalance(Mesh(1, 4)) == pytest.approx(1.0)


Event = tuple[str, int]


class _Recorded:
    """The code's ring as a rank runs it: what it queues on its stream and on that of its exchanges, in the host's order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.exchanges = 0

    @contextmanager
    def run(self) -> Iterator[_Joined]:
        self.events.append(("exchange", self.exchanges))
        yield _Joined(self.events, self.exchanges)
        self.exchanges += 1

    def get_rank(self, group: object) -> int:
        return 0

    def get_world_size(self, group: object) -> int:
        return self.ranks

    def all_to_all_single(self, *_: object, **__: object) -> None:
        pass

    def of(self, ranks: int, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
        """Those of a ring; ("attend", hop) stands for the kernel and the merge."""
        self.ranks = ranks
        monkeypatch.setattr(ring_module, "dist", self)
        shard = torch.zeros(1, 1, 1, 1)
        group, side = cast(dist.ProcessGroup, None), cast(SideStream, self)
        for hop, _ in enumerate(ring_module.ring_hops(shard, shard, (1,) * ranks, group, side)):
            self.events.append(("attend", hop))
        return self.events


class _Joined:
    def __init__(self, events: list[Event], exchange: int) -> None:
        self._event = events, ("join", exchange)

    def join(self) -> None:
        events, event = self._event
        events.append(event)


def _ends(events: list[Event], kernels: np.ndarray, exchange_ms: float) -> list[float]:
    """Two streams a rank on which those events happen in order; an exchange begins when both neighbours are at it, too."""
    ranks = len(kernels)
    main = [0.0] * ranks
    over: list[list[float]] = []  # of each exchange, on each rank
    for what, number in events:
        if what == "exchange":
            ready = [max(main[r], over[-1][r] if over else 0.0) for r in range(ranks)]
            over.append([max(ready[r - 1], ready[r], ready[(r + 1) % ranks]) + exchange_ms for r in range(ranks)])
        elif what == "join":
            main = [max(main[r], over[number][r]) for r in range(ranks)]
        else:
            main = [main[r] + kernels[r, (r - number) % ranks] for r in range(ranks)]
    return main


@pytest.mark.parametrize("ranks", range(2, 18))
def test_the_ring_waits_as_the_code_does(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events is that of the code's own loop; times are of a stand-in that knows nothing of buffers."""
    events = _Recorded().of(ranks, monkeypatch)
    mask = np.random.default_rng(ranks).random((4, ranks * 4, ranks * 4)) < 0.3
    mask[:, ::8] |= np.random.default_rng(1).random((4, len(range(0, ranks * 4, 8)), ranks * 4)) < 0.6
    layer = Layer(LayerSize(ranks * 4 * 128, 4), COSTS, mask)
    work = mask.reshape(4, ranks, 4, ranks, 4).sum((0, 2, 4)).astype(float)
    for exchange_ms in (0.0, float(work.mean()) / 2, float(work.mean()) * 2):
        slow = Cluster(replace(FREE, latency_us=exchange_ms * 500.0), FREE, ranks)  # keys, then values
        means_ms = exchange_ms / 2  # gathered before
        found = layer.replay(Mesh(1, ranks), slow).ends - means_ms
        np.testing.assert_allclose(found, _ends(events, work, exchange_ms), rtol=1e-9)


def test_a_shard_is_attended_when_it_has_arrived() -> None:
    """On a link of a millisecond an exchange: without work of their own, ranks wait for one hop after another."""
    slow = Cluster(replace(FREE, latency_us=500.0), FREE)  # keys, then values
    layer = _layer([[0, 1, 0], [0, 0, 1], [1, 0, 0]])  # all of it of the next rank's shard, which comes last
    selected = 0.5  # means of keys are gathered
    np.testing.assert_allclose(layer.replay(Mesh(1, 3), slow).ends, selected + 2.0 + 1.0)
    np.testing.assert_allclose(layer.replay(Mesh(1, 3, "all_gather"), slow).ends, selected + 0.5 + 1.0)


def test_pruned_keys_send_what_masks_choose() -> None:
    """Of the other shard's two blocks rank 0 attends one with head 0 and none with head 1, and rank 1 both with both."""
    first = [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1]]
    second = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    layer = Layer(LayerSize(512, 2), COSTS, np.array([first, second], dtype=np.bool_))
    np.testing.assert_allclose(layer.needed(2), [[[1.0, 0.5], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    mesh = Mesh(1, 2, "pruned")
    link = replace(FREE, gb_per_s=layer.size.token_bytes(256, 2) * 1e-6)  # a millisecond for a shard's keys, or values
    means_ms = 1 / 128  # of keys, gathered before
    # Five tiles each of their own shards, which take longer than the exchange, then two and four.
    np.testing.assert_allclose(layer.replay(mesh, Cluster(link, link)).ends, [means_ms + 7.0, means_ms + 9.0])
    # What rank 1 receives takes 20 ms; of what rank 0 does, a quarter, it would have been 5.
    slow = replace(link, gb_per_s=link.gb_per_s / 10)
    np.testing.assert_allclose(
        layer.replay(mesh, Cluster(slow, slow)).ends, 10 * means_ms + 20.0 + np.array([2.0, 4.0])
    )
    alone = Layer(
        layer.size, COSTS, np.array([[[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1]]], dtype=np.bool_)
    )
    np.testing.assert_allclose(alone.replay(mesh, Cluster(slow, slow)).ends[0], 10 * means_ms + 10.0 + 4.0)
    with pytest.raises(ValueError, match="dense attention chooses every key block"):
        Layer(layer.size, COSTS, None).replay(mesh, AT_ONCE)


def test_heads_that_do_not_divide() -> None:
    layer = _layer([[1, 1], [1, 1]], heads=5)
    replay = layer.replay(Mesh(2), AT_ONCE)
    np.testing.assert_allclose(replay.kernels, [12.0, 8.0])
    assert layer.imbalance(Mesh(2)) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="5 heads cannot be split over 6 ranks"):
        layer.replay(Mesh(6), AT_ONCE)


def test_ulysses_hides_what_its_chunks_hide() -> None:
    """Two chunks of one head: the first arrives and the last returns in sight, 3 tensors and 1."""
    layer = _layer([[1, 1], [1, 1]], heads=4)
    nbytes = layer.size.token_bytes(128, 1)
    link = replace(FREE, gb_per_s=nbytes * 1e-6)  # a millisecond for a tensor of one head
    replay = layer.replay(Mesh(2), Cluster(link, link))
    np.testing.assert_allclose(replay.ends, 3.0 + 4.0 + 4.0 + 1.0)


def test_links_within_and_between_nodes_carry_their_own() -> None:
    near, far = replace(FREE, gb_per_s=100.0), replace(FREE, gb_per_s=10.0, latency_us=1000.0)
    cluster = Cluster(near, far, node=2)
    assert cluster.send_ms(0, {1: 1e9}) == pytest.approx(10.0)
    assert cluster.send_ms(0, {1: 1e9, 2: 5e7, 3: 5e7}) == pytest.approx(11.0)
    assert cluster.send_ms(1, {2: 1e9}, exchanges=2) == pytest.approx(102.0)


def test_an_exchange_takes_from_the_attention_above_it() -> None:
    costs = replace(COSTS, exchange_share=0.5)
    assert costs.slowed_ms(10.0, 0.0, (4.0, 8.0)) == 12.0
    assert costs.slowed_ms(10.0, 0.0, (10.0, 20.0)) == 10.0
    assert costs.slowed_ms(10.0, 0.0, (-1.0, 1.0), (4.0, 6.0), (9.0, 20.0)) == 12.0


def test_rows_come_to_an_end_in_waves() -> None:
    costs = replace(COSTS, multiprocessors=4)
    assert costs.kernel_ms(8, 8) == 8.0
    assert costs.kernel_ms(9, 9) == pytest.approx(12.0)


def test_dense_attention_has_no_selection() -> None:
    layer = Layer(LayerSize(256, 1), replace(COSTS, pair_ns=1e9), None)
    np.testing.assert_allclose(layer.replay(Mesh(1, 2), AT_ONCE).ends, 4.0)


def test_the_model_is_near_to_what_was_measured() -> None:
    """All layers of 480p, most of which are of two GPUs, whose times the fit has not seen."""
    costs = fit(read_rows(MEASURED))
    found = check(read_results(sorted((MEASURED / "480p").glob("attention*.jsonl"))), costs)
    assert len(found) == 15
    assert [one.error for one in found if not one.met] == []
    assert costs.nvlink.measured
    assert not costs.link("pcie").measured


def test_results_that_lack_a_part_are_refused() -> None:
    rows = read_rows(MEASURED)
    with pytest.raises(ValueError, match="0 timelines of two GPUs"):
        fit([row for row in rows if row["what"] != "timeline"])
    with pytest.raises(ValueError, match="holds no attention"):
        read_rows(ROOT / "docs/benchmarks/2026-11-25_mini")


def _recording(path: Path) -> Path:
    mask = np.random.default_rng(0).random((1, 2, 16, 16)).argsort(-1) < 5
    RecordedMasks(((0, 0, 0),), np.packbits(mask, axis=-1), (16, 16), 256, {}).save(path)
    return path


def test_the_command_writes_tables_pictures_and_every_number(tmp_path: Path) -> None:
    flags = ["--masks", str(_recording(tmp_path / "masks.npz")), "--gpus", "1", "2", "8", "--sizes", "480p"]
    assert main(["simulate", *flags, "--links", "nvlink", "pcie", "--output-dir", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.md", "scaling.md", "balance.md", "simulated.jsonl", "simulated_32760.png"}
    rows = [json.loads(line) for line in (tmp_path / "out/simulated.jsonl").read_text().splitlines()]
    assert {row["link_assumed"] for row in rows if row["link"] == "nvlink"} == {False}
    assert {row["link_assumed"] for row in rows if row["link"] == "pcie" and row["gpus"] > 1} == {True}
    assert {(row["ulysses"], row["ring"]) for row in rows if row["auto"] and row["gpus"] == 8} == {(8, 1)}
    # A ring of 8 would cut 16 recorded blocks too fine.
    assert max(row["ring"] for row in rows) == 4
    table = (tmp_path / "out/scaling.md").read_text()
    assert "| 32760 | 0.31 | nvlink | 2 | U1×R2" in table
    assert "U2×R1 5.97" in table  # as measured
    assert "| pcie* | 8 |" in table


def test_what_is_no_recording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "masks.npz"
    path.write_text("")
    assert main(["simulate", "--masks", str(path), "--output-dir", str(tmp_path)]) == 2
    assert "holds no recorded masks" in capsys.readouterr().err
