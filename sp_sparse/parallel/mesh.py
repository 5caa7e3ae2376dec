"""Who works with whom: the Ulysses, ring and CFG process groups of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from sp_sparse.parallel.agreement import check_call, check_same
from sp_sparse.parallel.streams import SideStream


@dataclass(frozen=True, eq=False)
class SequenceParallelMesh:
    """The process groups over which one sequence is sharded.

    `SequenceParallelMesh(ulysses_degree=2, ring_degree=2)` builds them, and is then a collective call: every rank of the
    default process group makes it, with the same degrees. The order of ranks is
    `(cfg_rank * ring_degree + ring_rank) * ulysses_degree + ulysses_rank`: the ranks of a Ulysses group are neighbours.
    Nothing is kept outside the object, so a process may hold several meshes.

    Attributes:
        ulysses_degree: ranks that split the heads between them (all-to-all).
        ring_degree: ranks that pass key/value shards around.
        cfg_degree: 2 runs the conditional and the unconditional branch on different ranks; else 1.
        ulysses_group, ring_group, cfg_group: this rank's groups, None where the degree is 1.
        timeout: how long a rank waits for the others in the groups built here; None leaves torch's default.

    Raises:
        ValueError: a degree below 1, or degrees whose product is not the number of ranks.
        RuntimeError: no process group, or ranks that ask for different meshes.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_degree: int = 1
    ulysses_group: ProcessGroup | None = None
    ring_group: ProcessGroup | None = None
    cfg_group: ProcessGroup | None = None
    timeout: timedelta | None = None
    _side_streams: dict[torch.device, SideStream] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree", "cfg_degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; use 1 to switch it off")
        if self.cfg_degree > 2:
            raise ValueError(f"cfg_degree={self.cfg_degree}: guidance has 2 branches; use 1 or 2")
        given = self.ulysses_group or self.ring_group or self.cfg_group
        if given is None and self.sequence_degree * self.cfg_degree > 1:
            self._build_groups()
        for degree, group, name in (
            (self.ulysses_degree, self.ulysses_group, "ulysses"),
            (self.ring_degree, self.ring_group, "ring"),
            (self.cfg_degree, self.cfg_group, "cfg"),
        ):
            if degree > 1 and group is None:
                raise ValueError(f"{name}_degree={degree} was given no group; pass a group of {degree} ranks")
            if group is not None and dist.get_world_size(group) != degree:
                size = dist.get_world_size(group)
                raise ValueError(
                    f"{name}_degree={degree} was given a group of {size} ranks; pass a group of {degree} ranks, or "
                    f"{name}_degree={size}"
                )

    @classmethod
    def from_device_mesh(
        cls, mesh: DeviceMesh, ulysses_dim: str = "ulysses", ring_dim: str = "ring"
    ) -> SequenceParallelMesh:
        """Take the groups of a torch `DeviceMesh` with the named dimensions, either of which may be absent.

        Ulysses must vary faster than ring along the sequence: `init_device_mesh(…, (R, U),
        mesh_dim_names=("ring", "ulysses"))`.
        """
        names = mesh.mesh_dim_names or ()
        if ulysses_dim not in names and ring_dim not in names:
            raise ValueError(
                f"the device mesh has dimensions {names}, neither {ulysses_dim!r} nor {ring_dim!r}; name one of them so"
            )
        if ulysses_dim in names and ring_dim in names and names.index(ulysses_dim) < names.index(ring_dim):
            raise ValueError(
                f"the device mesh has dimensions {names}: {ring_dim!r} must come before {ulysses_dim!r}, so that the "
                f"ranks of a Ulysses group hold neighbouring shards"
            )

        def axis(name: str) -> tuple[int, ProcessGroup | None]:
            size = mesh[name].size() if name in names else 1
            # torch sorts the ranks of a group, whatever their order in the mesh.
            if size > 1 and bool((mesh.mesh.diff(dim=names.index(name)) < 0).any()):
                raise ValueError(
                    f"the ranks {mesh.mesh.tolist()} of the device mesh do not ascend along {name!r}, so their places in "
                    "its groups are not their places in the mesh; order them so that they do"
                )
            return size, mesh.get_group(name) if size > 1 else None

        ulysses_degree, ulysses_group = axis(ulysses_dim)
        ring_degree, ring_group = axis(ring_dim)
        return cls(ulysses_degree, ring_degree, ulysses_group=ulysses_group, ring_group=ring_group)

    @property
    def sequence_degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree

    @property
    def ulysses_rank(self) -> int:
        return _rank(self.ulysses_group)

    @property
    def ring_rank(self) -> int:
        return _rank(self.ring_group)

    @property
    def cfg_rank(self) -> int:
        return _rank(self.cfg_group)

    @property
    def sequence_rank(self) -> int:
        """Position of this rank's shard in the sequence."""
        return self.ring_rank * self.ulysses_degree + self.ulysses_rank

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The groups of more than one rank."""
        return tuple(g for g in (self.ulysses_group, self.ring_group, self.cfg_group) if g is not None)

    @property
    def sequence_groups(self) -> tuple[ProcessGroup, ...]:
        """Those of them that share one sequence."""
        return tuple(g for g in (self.ulysses_group, self.ring_group) if g is not None)

    def side_stream(self, device: torch.device) -> SideStream:
        """Where exchanges run beside what `device` computes; one for all layers of the mesh."""
        if device not in self._side_streams:
            self._side_streams[device] = SideStream(device)
        return self._side_streams[device]

    def check_same(self, what: str, value: object) -> None:
        """Fail on every rank if the ranks of the mesh hold different values of `what`. A collective call.

        Raises:
            RuntimeError: with each rank's value; without this, ranks that differ would wait for each other for ever.
        """
        check_same(what, value, self.groups)

    def check_call(self, values: Mapping[str, object], device: torch.device) -> None:
        """`check_same` for what is compared at each call: cheap, but it waits for `device`. A collective call."""
        check_call(values, self.groups, device, "make the same call on every rank")

    def _build_groups(self) -> None:
        wanted = self.cfg_degree * self.ring_degree * self.ulysses_degree
        shape = f"cfg_degree={self.cfg_degree} x ulysses_degree={self.ulysses_degree} x ring_degree={self.ring_degree}"
        if not dist.is_initialized():
            raise RuntimeError(
                f"{shape} needs {wanted} ranks but torch.distributed is not initialised; start with "
                f"`torchrun --nproc-per-node {wanted}` and call torch.distributed.init_process_group first"
            )
        world = dist.get_world_size()
        asked: list[tuple[int, int, int] | None] = [None] * world
        dist.all_gather_object(asked, (self.cfg_degree, self.ulysses_degree, self.ring_degree))
        if len(set(asked)) > 1:
            raise RuntimeError(
                f"ranks differ in (cfg_degree, ulysses_degree, ring_degree): {dict(enumerate(asked))}; "
                "start every rank with the same arguments"
            )
        if wanted != world:
            raise ValueError(
                f"{shape} = {wanted}, but there are {world} ranks; start {wanted} ranks, "
                f"or choose degrees whose product is {world}"
            )
        ulysses_group, ring_group = _yunchang_groups(self.ulysses_degree, self.ring_degree)
        if self.ulysses_degree > 1:
            object.__setattr__(self, "ulysses_group", ulysses_group)
        if self.ring_degree > 1:
            object.__setattr__(self, "ring_group", ring_group)
        if self.cfg_degree > 1:
            pairs = [
                [i + j * self.sequence_degree for j in range(self.cfg_degree)] for i in range(self.sequence_degree)
            ]
            object.__setattr__(self, "cfg_group", dist.new_subgroups_by_enumeration(pairs)[0])
        if self.timeout is not None:
            for group in self.groups:
                _set_timeout(group, self.timeout)


def _set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """new_group does not take over the timeout of init_process_group, and yunchang passes none."""
    setter = getattr(distributed_c10d, "_set_pg_timeout", None)
    if setter is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no distributed_c10d._set_pg_timeout, which sets how long ranks wait; "
            "leave timeout=None, or give groups made with a timeout of their own"
        )
    setter(timeout, group)


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _yunchang_groups(ulysses_degree: int, ring_degree: int) -> tuple[ProcessGroup, ProcessGroup]:
    """Groups as USP (arXiv 2405.07719) lays them out; the handles are copied out of yunchang's process-wide singleton."""
    with _kept_environment("TORCH_CUDA_ARCH_LIST"):
        try:
            from yunchang.globals import PROCESS_GROUP, set_seq_parallel_pg
        except Exception as error:  # its import probes GPUs and optional packages, and may raise anything
            raise RuntimeError(
                f"yunchang cannot be imported ({type(error).__name__}: {error}); reinstall it, or build the mesh from "
                "your own groups with SequenceParallelMesh.from_device_mesh"
            ) from error
    set_seq_parallel_pg(ulysses_degree, ring_degree, dist.get_rank(), dist.get_world_size())
    return PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG


@contextmanager
def _kept_environment(name: str) -> Iterator[None]:
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
