"""`--mesh auto`: what is chosen for which ranks, what flags fix, what is refused, and that every command takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sp_sparse.fidelity.arguments import parse_arguments as parse_fidelity
from sp_sparse.generate.__main__ import main
from sp_sparse.generate.arguments import parse_arguments
from sp_sparse.generate.attach import check_ranks
from sp_sparse.generate.auto_mesh import Situation, choose_mesh, with_mesh
from sp_sparse.generate.models import find_model
from sp_sparse.generate.ranks import Ranks
from sp_sparse.serve.arguments import parse_serve_arguments
from tests.ranks import run_ranks

A14B, TI2V = 40, 24
MANY = 591
SPARSE = ("--model", "tiny", "--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3")


def _nodes(*counts: int) -> tuple[str, ...]:
    return tuple(f"node {number}" for number, count in enumerate(counts) for _ in range(count))


def _situation(*counts: int, heads: int = A14B, guided: bool = True, **other: Any) -> Situation:
    return Situation(_nodes(*counts), heads, other.pop("blocks", MANY), guided, **other)


@pytest.mark.parametrize(
    ("situation", "cfg", "ulysses", "ring", "why"),
    [
        (_situation(1), 1, 1, 1, "nothing to share"),
        (_situation(2), 2, 1, 1, "two halves"),
        (_situation(4), 2, 1, 2, "ring than by Ulysses (measured)"),
        (_situation(8), 2, 4, 1, "4 ranks share the 40 heads equally"),
        (_situation(8, heads=TI2V), 2, 4, 1, "24 heads equally"),
        (_situation(6), 2, 3, 1, "5% more than the mean"),
        (_situation(3), 1, 3, 1, "3 ranks have no halves"),
        (_situation(7), 1, 7, 1, "unequally"),
        (_situation(7, heads=TI2V), 1, 7, 1, "unequally, 17% more"),
        (_situation(2, guided=False), 1, 1, 2, "guidance is off"),
        (_situation(4, guided=False), 1, 4, 1, "guidance is off"),
        (_situation(8, guided=False), 1, 8, 1, "8 ranks share"),
        # Not 16: its fullest rank would have 3 heads of 2.5.
        (_situation(16, guided=False), 1, 8, 2, "a ring of 2 shares the rest (modelled, not measured)"),
        (_situation(8, 8), 2, 8, 1, "8 ranks within a node share"),
        (_situation(8, 8, guided=False), 1, 8, 2, "8 ranks within a node"),
        (_situation(8, 8, 8, 8), 2, 8, 2, "a ring of 2"),
        # Rather Ulysses across nodes than a long ring; not 32, of which the fullest would have 2 heads of 1.25.
        (_situation(*[8] * 8), 2, 16, 2, "16 ranks across nodes share the 40 heads unequally, 20% more"),
        (_situation(1, 1, 1, 1, guided=False), 1, 4, 1, "4 ranks across nodes share the 40 heads equally (modelled"),
        (_situation(1, 1, guided=False), 1, 1, 2, "two ranks share"),
        (_situation(4, 4, 4), 2, 6, 1, "6 ranks across nodes"),
        # Nodes of unequally many ranks, whose edge no degree but a long ring's keeps to.
        (_situation(6, 2, guided=False), 1, 8, 1, "8 ranks across nodes"),
        # A layer of few heads: one each.
        (_situation(8, heads=4, guided=False), 1, 4, 2, "4 heads equally"),
        # diffusers' own parallelism has no halves.
        (_situation(4, halves=False), 1, 4, 1, "guidance branches share the ranks"),
        # Too few blocks for a ring of 2 across nodes: Ulysses crosses.
        (_situation(2, 2, guided=False, blocks=1), 1, 4, 1, "across nodes"),
        # A kernel without LSE.
        (_situation(4, ring=False), 2, 2, 1, "2 ranks share"),
        (_situation(8, fixed=(("ring_degree", 4),)), 2, 1, 4, "flags gave --ring-degree 4"),
        (_situation(8, fixed=(("cfg_parallel_degree", 1),)), 1, 8, 1, "flags gave --cfg-parallel-degree 1"),
        (_situation(8, fixed=(("ulysses_degree", 1),)), 2, 1, 4, "flags gave --ulysses-degree 1"),
        (_situation(8, fixed=(("ulysses_degree", 2), ("cfg_parallel_degree", 1))), 1, 2, 4, "--ulysses-degree 2"),
    ],
)  # fmt: skip
def test_what_is_chosen(situation: Situation, cfg: int, ulysses: int, ring: int, why: str) -> None:
    choice = choose_mesh(situation)
    assert (choice.cfg_parallel_degree, choice.ulysses_degree, choice.ring_degree) == (cfg, ulysses, ring)
    assert why in choice.reason


@pytest.mark.parametrize("ranks", range(1, 65))
@pytest.mark.parametrize("heads", [4, 24, 40])
def test_every_number_of_ranks_gets_a_mesh_of_all_of_them(ranks: int, heads: int) -> None:
    choice = choose_mesh(_situation(ranks, heads=heads))
    assert choice.ulysses_degree * choice.ring_degree * choice.cfg_parallel_degree == ranks
    assert choice.ulysses_degree <= heads


@pytest.mark.parametrize(
    ("situation", "told"),
    [
        (_situation(8, fixed=(("ring_degree", 3),)), "no mesh for 8 ranks with --ring-degree 3.*leave out those flags"),
        (_situation(8, guided=False, fixed=(("cfg_parallel_degree", 2),)), "guidance is off.*leave out those flags"),
        (_situation(8, halves=False, fixed=(("cfg_parallel_degree", 2),)), "need a sparse attention backend"),
        (_situation(7, heads=4, blocks=3), "4 heads allow Ulysses up to 4; 3 token blocks.*up to 3.*start fewer ranks"),
        (_situation(7, heads=4, ring=False), "no LSE"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(situation: Situation, told: str) -> None:
    with pytest.raises(ValueError, match=f"{told}.*choose degrees whose product is"):
        choose_mesh(situation)


def _ranks(*counts: int) -> Ranks:
    nodes = _nodes(*counts)
    return Ranks(1, len(nodes), torch.device("cpu"), nodes)


def test_flags_are_kept_to_and_heads_are_the_models() -> None:
    chosen = with_mesh(parse_arguments([*SPARSE, "--mesh", "auto"]), _ranks(16))
    assert (chosen.cfg_parallel_degree, chosen.ulysses_degree, chosen.ring_degree) == (2, 8, 1)  # tiny has 8 heads
    assert chosen.ranks_wanted == 16
    assert chosen.mesh_reason
    # A degree of 1 that was given is kept to as well.
    chosen = with_mesh(parse_arguments([*SPARSE, "--mesh", "auto", "--ulysses-degree", "1"]), _ranks(4))
    assert (chosen.cfg_parallel_degree, chosen.ulysses_degree, chosen.ring_degree) == (2, 1, 2)
    chosen = with_mesh(parse_arguments([*SPARSE, "--mesh", "auto", "--guidance-scale", "1"]), _ranks(2))
    assert (chosen.cfg_parallel_degree, chosen.ulysses_degree, chosen.ring_degree) == (1, 1, 2)
    chosen = with_mesh(parse_arguments(["--model", "tiny", "--mesh", "auto"]), _ranks(8))  # backend none
    assert (chosen.cfg_parallel_degree, chosen.ulysses_degree, chosen.ring_degree) == (1, 8, 1)
    asked = parse_arguments([*SPARSE, "--ulysses-degree", "2"])
    assert with_mesh(asked, _ranks(8)) is asked


def test_a_group_across_nodes_that_was_chosen_is_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = replace(_ranks(1, 1, 1, 1), rank=0)
    chosen = with_mesh(parse_arguments([*SPARSE, "--mesh", "auto", "--guidance-scale", "1"]), ranks)
    check_ranks(chosen, ranks)
    told = capsys.readouterr().err
    assert "4 ranks across nodes" in told
    assert "crosses nodes" not in told


def test_the_size_bounds_a_ring() -> None:
    """20 blocks of 16 tokens, 8 heads: 7 ranks would need a ring of 7 if heads did not allow Ulysses; 11 ranks do."""
    flags = [*SPARSE, "--mesh", "auto", "--guidance-scale", "1"]
    assert with_mesh(parse_arguments(flags), _ranks(11)).ring_degree == 11
    with pytest.raises(ValueError, match=r"23 ranks: 8 heads .* 20 token blocks"):
        with_mesh(parse_arguments(flags), _ranks(23))


def test_an_exchange_for_a_ring_that_is_not_chosen_is_refused() -> None:
    arguments = parse_arguments([*SPARSE, "--mesh", "auto", "--sparse-attn-kv-exchange", "all_gather"])
    with pytest.raises(ValueError, match="--ring-degree is 1"):
        with_mesh(arguments, _ranks(2))
    assert with_mesh(arguments, _ranks(4)).ring_degree == 2


@pytest.mark.parametrize(("model", "heads", "pixels", "layers"), [
    ("mini", 4, 8, 6), ("a14b-random", 40, 16, 4), ("ti2v-5b-random", 24, 32, 4), ("tiny-ti2v", 6, 32, 2),
    ("tiny-2.1", 8, 16, 2), ("tiny-vace", 8, 16, 3),
])  # fmt: skip
def test_what_is_known_of_a_model(model: str, heads: int, pixels: int, layers: int) -> None:
    found = find_model(parse_arguments(["--model", model]), torch.device("cpu"))
    assert (found.heads, found.token_pixels, found.layers) == (heads, pixels, layers)


def test_every_command_tells_what_flags_gave(tmp_path: Path) -> None:
    flags = ["--mesh", "auto", "--ring-degree", "1", "--model", "tiny"]
    assert parse_serve_arguments(flags).base().given_degrees == ("ring_degree",)
    configured = tmp_path / "config.json"
    configured.write_text(json.dumps({"mesh": "auto", "ulysses_degree": 2}))
    fidelity = ["--prompts", "p.txt", "--output", str(tmp_path), "--config", str(configured)]
    base = parse_fidelity(fidelity).base()
    assert base.given_degrees == ("ulysses_degree",)
    assert base.mesh == "auto"
    assert parse_arguments(["--config", str(configured)]).given_degrees == ("ulysses_degree",)
    assert replace(parse_arguments(["--mesh", "auto"]), seed=1).given_degrees == ()


def _rank_generates(rank: int, folder: Path) -> None:
    flags = ["--mesh", "auto", "--num-inference-steps", "2", "--output", str(folder / "video.mp4")]
    assert main([*SPARSE, *flags]) == 0


def test_ranks_run_what_was_chosen_and_the_report_says_why(tmp_path: Path) -> None:
    run_ranks(2, _rank_generates, tmp_path)
    mesh = json.loads((tmp_path / "video.json").read_text())["mesh"]
    assert mesh["cfg_degree"] == 2
    assert "two halves" in mesh["reason"]
