"""`--mesh auto`: guidance halves, Ulysses and ring degree for the ranks, nodes, heads and size at hand.

The order of preference is measured on two GPUs and modelled for more (docs/parallelism.md, `launch/benchmark.py simulate`).
Links are not looked at: ranks of a node are taken to be close, nodes to be far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sp_sparse.flags import flag_of
from sp_sparse.generate.arguments import DEGREES, GenerateArguments
from sp_sparse.generate.asked import fill_defaults
from sp_sparse.generate.models import WanModel, find_model
from sp_sparse.generate.ranks import Ranks
from sp_sparse.kernels.registry import load_kernel
from sp_sparse.mask import num_blocks

# Most heads of a rank over the mean. Modelled, 24 heads on 7 ranks (1.17) are still faster than a ring of 7, and 40 on 16
# (1.2) no more than 8 within a ring of 2.
_UNEVEN = 1.18
# Ranks of a ring. It sends keys and values R - 1 times: modelled, more of them are slower than Ulysses across nodes.
_LONG_RING = 2


@dataclass(frozen=True)
class Situation:
    """What a mesh is chosen for; the same on all ranks.

    Attributes:
        nodes: of each rank, the name of its node, as many as there are ranks.
        heads: of a layer.
        blocks: that the sequence can be cut into for a ring, none of which is shared by two ranks.
        guided: whether there are two guidance branches.
        halves, ring: whether guidance halves and a ring are possible at all.
        fixed: degrees that flags give, by the names of `MeshChoice`.
    """

    nodes: tuple[str, ...]
    heads: int
    blocks: int
    guided: bool
    halves: bool = True
    ring: bool = True
    fixed: tuple[tuple[str, int], ...] = ()

    @property
    def ranks(self) -> int:
        return len(self.nodes)

    @property
    def flags(self) -> list[str]:
        """Those that give degrees, as they are written."""
        return [f"{flag_of(name)} {degree}" for name, degree in self.fixed]


@dataclass(frozen=True)
class MeshChoice:
    """Degrees whose product is the number of ranks, and why they were chosen."""

    ulysses_degree: int
    ring_degree: int
    cfg_parallel_degree: int
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"--cfg-parallel-degree {self.cfg_parallel_degree} --ulysses-degree {self.ulysses_degree} "
            f"--ring-degree {self.ring_degree}"
        )


def choose_mesh(situation: Situation) -> MeshChoice:
    """The mesh that is preferred among those that are possible.

    Guidance halves come first; then a ring of two at most; a Ulysses group within a node rather than across; for two ranks
    that share a sequence a ring of two; else the most Ulysses ranks whose heads are near to equal.

    Raises:
        ValueError: no mesh is possible, or none with the degrees that flags give; with the remedy.
    """
    meshes = _possible(situation)
    if not meshes:
        raise ValueError(_refusal(situation))
    best = max(meshes, key=lambda mesh: _preference(mesh, situation))
    return replace(best, reason=_reason(best, situation))


def _possible(situation: Situation) -> list[MeshChoice]:
    ranks, found = situation.ranks, []
    for cfg in (1, 2):
        if ranks % cfg or (cfg == 2 and not (situation.guided and situation.halves)):
            continue
        share = ranks // cfg
        for ulysses in (degree for degree in range(1, min(share, situation.heads) + 1) if share % degree == 0):
            ring = share // ulysses
            mesh = MeshChoice(ulysses, ring, cfg)
            fits = ring == 1 or (situation.ring and ring <= situation.blocks)
            if fits and all(getattr(mesh, name) == degree for name, degree in situation.fixed):
                found.append(mesh)
    return found


def _preference(mesh: MeshChoice, situation: Situation) -> tuple[float, ...]:
    """The higher, the better."""
    pair = mesh.ulysses_degree * mesh.ring_degree == 2
    return (
        mesh.cfg_parallel_degree,
        mesh.ring_degree <= _LONG_RING,
        crossing_group(mesh.ulysses_degree, situation.nodes) is None,
        pair and mesh.ring_degree == 2,
        -max(_unevenness(mesh, situation), _UNEVEN),
        mesh.ulysses_degree,
    )


def _unevenness(mesh: MeshChoice, situation: Situation) -> float:
    """Most heads of a rank over the mean."""
    return math.ceil(situation.heads / mesh.ulysses_degree) * mesh.ulysses_degree / situation.heads


def _reason(mesh: MeshChoice, situation: Situation) -> str:
    told = []
    if mesh.cfg_parallel_degree == 2:
        told.append("the guidance branches run on two halves, which exchange least")
    elif not situation.guided:
        told.append("guidance is off")
    elif not situation.halves:
        told.append("without sp_sparse's attention the guidance branches share the ranks")
    elif situation.ranks % 2 and situation.ranks > 1:
        told.append(f"{situation.ranks} ranks have no halves")
    share = mesh.ulysses_degree * mesh.ring_degree
    if share == 1:
        told.append("each holds its whole sequence" if situation.ranks > 1 else "one rank has nothing to share")
    elif mesh.ulysses_degree == 1 and share == 2:
        told.append("two ranks share a sequence faster in a ring than by Ulysses (measured)")
    else:
        crossing = crossing_group(mesh.ulysses_degree, situation.nodes)
        where = "" if len(set(situation.nodes)) == 1 else " within a node" if crossing is None else " across nodes"
        if mesh.ulysses_degree > 1:
            uneven = _unevenness(mesh, situation)
            equal = "equally" if uneven == 1 else f"unequally, {uneven - 1:.0%} more than the mean on the fullest"
            modelled = " (modelled, not measured)" if crossing is not None else ""
            told.append(f"{mesh.ulysses_degree} ranks{where} share the {situation.heads} heads {equal}{modelled}")
        if mesh.ring_degree > 1:
            told.append(f"a ring of {mesh.ring_degree} shares the rest (modelled, not measured)")
    if situation.fixed:
        told.append(f"flags gave {', '.join(situation.flags)}")
    return "; ".join(told)


def _refusal(situation: Situation) -> str:
    fixed = " ".join(situation.flags)
    limits = [f"{situation.heads} heads allow Ulysses up to {situation.heads}"]
    limits.append(
        f"{situation.blocks} token blocks allow a ring up to {situation.blocks}"
        if situation.ring
        else "the kernel returns no LSE, without which there is no ring"
    )
    if not situation.guided:
        limits.append("guidance is off, so that there are no halves")
    elif not situation.halves:
        limits.append("guidance halves need a sparse attention backend")
    remedy = "leave out those flags" if fixed else "start fewer ranks"
    return (
        f"--mesh auto finds no mesh for {situation.ranks} ranks{f' with {fixed}' if fixed else ''}: {'; '.join(limits)}; "
        f"{remedy}, or choose degrees whose product is {situation.ranks}, without --mesh auto"
    )


def crossing_group(ulysses_degree: int, nodes: Sequence[str]) -> range | None:
    """The ranks of the first Ulysses group that is not within one node."""
    groups = (range(first, first + ulysses_degree) for first in range(0, len(nodes), ulysses_degree))
    return next((group for group in groups if nodes[group[0]] != nodes[group[-1]]), None)


def with_mesh(arguments: GenerateArguments, ranks: Ranks) -> GenerateArguments:
    """The arguments with the degrees that `--mesh auto` chooses, told to the user; without it, as they are.

    Raises:
        ValueError: nothing fits, or no such model.
    """
    if arguments.mesh != "auto":
        return arguments
    choice = choose_mesh(_situation(arguments, find_model(arguments, ranks.device), ranks))
    ranks.say(f"mesh auto: {choice}: {choice.reason}")
    degrees = {name: getattr(choice, name) for name in DEGREES}
    return replace(arguments, mesh="degrees", mesh_reason=choice.reason, **degrees)


def _situation(arguments: GenerateArguments, model: WanModel, ranks: Ranks) -> Situation:
    filled, sparse = fill_defaults(arguments, model), arguments.sparse
    assert filled.height is not None
    assert filled.width is not None
    assert filled.num_frames is not None
    side = model.token_pixels
    frames = (filled.num_frames - 1) // model.temporal_multiple + 1
    tokens = frames * (filled.height // side) * (filled.width // side)
    ours = sparse.backend != "none"
    return Situation(
        nodes=ranks.nodes or ("",) * ranks.world,
        heads=model.heads,
        blocks=num_blocks(tokens, math.lcm(*sparse.block_size)),
        guided=filled.guidance_scale is None or filled.guidance_scale > 1,
        halves=ours,
        ring=sparse.backend in ("none", "auto") or load_kernel(sparse.backend).info.returns_lse,
        fixed=tuple((name, getattr(arguments, name)) for name in DEGREES if name in arguments.given_degrees),
    )
