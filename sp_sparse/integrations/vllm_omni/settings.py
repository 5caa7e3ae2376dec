"""What vllm-omni's flags say of SP_SPARSE: the fields of `block_sparse`, and our options there or in `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sp_sparse.config import SECOND_EXPERT, SparseAttentionConfig

KEY = "sp_sparse"

# Our names for what vllm-omni has flags of its own for.
_ELSEWHERE = {
    "topk": "block_sparse.sparsity, the share of key blocks left out: topk is 1 - sparsity",
    "dense_steps": "block_sparse.start_step",
    "dense_layers": 'block_sparse.skip_layers, such as "0-3,38"',
}
# vllm-omni's own fields; what else stands beside them is an option of ours.
BLOCK_SPARSE = frozenset({"sparsity", "start_step", "end_step", "precision", "skip_layers"})
_ADDITIONAL = f'"{KEY}" in --additional-config'


@dataclass(frozen=True)
class Settings:
    """What is sparse, and how.

    Attributes:
        config: kernel, selection, blocks and schedule.
        start_step: first denoising steps that stay dense.
        end_step: last denoising steps that stay dense.
        skip_layers: numbers of layers that stay dense.
        num_steps: denoising steps of a request, where the pipeline does not tell it.
    """

    config: SparseAttentionConfig
    start_step: int = 0
    end_step: int = 0
    skip_layers: frozenset[int] = frozenset()
    num_steps: int | None = None

    def __post_init__(self) -> None:
        schedule = self.config.schedule_for(0)
        total = self.num_steps
        if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
            raise ValueError(
                f"num_steps={total!r}; give the denoising steps of a request, a whole number of at least 1"
            )
        if self.num_steps is None and (self.end_step or schedule.needs_step):
            what = f"block_sparse.end_step={self.end_step}" if self.end_step else f"schedule {schedule.kind!r}"
            raise ValueError(
                f"{what} needs the number of denoising steps, which vllm-omni's Wan pipelines do not tell; add "
                '"num_steps" to block_sparse (requests must then ask for as many), or use start_step'
            )

    @classmethod
    def read(cls, block_sparse: Mapping[str, Any] | None, additional: Mapping[str, Any] | None) -> Settings:
        """From the backend's arguments (`AttentionSpec.backend_kwargs()`) and the server's `additional_config`.

        Raises:
            ValueError: an unknown name, a value out of range, or something that cannot be had here.
        """
        given = dict(block_sparse or {})
        options = _options(given, additional)
        sparsity = given.get("sparsity", 0.8)
        if given.get("precision", "bf16") != "bf16":
            raise ValueError(
                f"block_sparse.precision={given['precision']!r}: SP_SPARSE computes in the model's dtype; leave it out"
            )
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"block_sparse.sparsity={sparsity} would leave out every block; use less than 1.0")
        num_steps = options.pop("num_steps", None)
        # A preset brings a density and a schedule, unless they are given.
        own = {} if "preset" in options else {"backend": "auto", "schedule": "constant"}
        if "preset" not in options or "sparsity" in given:
            own["topk"] = round(1.0 - sparsity, 9)
        config = SparseAttentionConfig.from_mapping({**own, **options})
        if "sparsity" in given:
            try:
                config.check_read({"topk"})
            except ValueError as error:
                raise ValueError(f"block_sparse.sparsity={sparsity} is topk: {error}") from None
        if config.backend == "none":
            raise ValueError('option backend is "none"; name a kernel or "auto", or choose another attention backend')
        return cls(
            config,
            given.get("start_step", 0),
            given.get("end_step", 0),
            frozenset(given.get("skip_layers", ())),
            int(num_steps) if isinstance(num_steps, str) else num_steps,
        )

    def density(self, layer: int | None, step: int | None, num_steps: int | None) -> float:
        """The share of key blocks to keep in a layer at a step, 1.0 being dense.

        Args:
            layer: number of the layer, None where its name holds none.
            step, num_steps: as vllm-omni's forward context tells them, None where it does not.

        Raises:
            ValueError: a layer or step that is not known and matters, or a step beyond `num_steps`.
        """
        if self.start_step and step is None:
            raise ValueError(
                f"block_sparse.start_step={self.start_step} needs the denoising step, which this pipeline does not tell; "
                "leave start_step out"
            )
        if layer in self.skip_layers or (self.start_step and step is not None and step < self.start_step):
            return 1.0
        num_steps = self.total(num_steps)
        if self.end_step and num_steps is not None:
            if step is None:
                raise ValueError(
                    f"block_sparse.end_step={self.end_step} needs the denoising step, which is not told here"
                )
            if step >= num_steps - self.end_step:
                return 1.0
        return self.config.schedule_for(0).density(layer or 0, step, num_steps)

    @property
    def depends_on_layer(self) -> bool:
        """Whether the density differs from layer to layer."""
        config = self.config
        return bool(self.skip_layers) or config.schedule == "conservative" or len(config.schedule_table) > 1

    def total(self, num_steps: int | None) -> int | None:
        """Number of denoising steps: what the pipeline tells goes before what was configured."""
        return self.num_steps if num_steps is None else num_steps


def known_options() -> set[str]:
    """Names of the options that can be given here."""
    names = {option.name for option in fields(SparseAttentionConfig)} - {*_ELSEWHERE, *SECOND_EXPERT}
    return names | {"num_steps", "preset"}


def check_names(options: Mapping[str, Any], where: str) -> None:
    """Refuse options that are not ours, or that are not said under this name here.

    Args:
        where: what holds them.

    Raises:
        ValueError: with what to give instead.
    """
    for name in options:
        if name in _ELSEWHERE:
            raise ValueError(f"{name} is not read from {where}; use {_ELSEWHERE[name]}")
        if name in SECOND_EXPERT:
            raise ValueError(
                f"{name} in {where} is for Wan 2.2's second expert, whose layers vllm-omni gives the names of the first's; "
                "here both experts go by the same settings: leave it out"
            )
    known = known_options()
    unknown = sorted(set(options) - known)
    if unknown:
        known |= BLOCK_SPARSE if where == "block_sparse" else set()
        raise ValueError(f"unknown options {', '.join(unknown)} in {where}; known are {', '.join(sorted(known))}")


def _options(block_sparse: Mapping[str, Any], additional: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our options from both places, each of which is given in one."""
    here = {name: value for name, value in block_sparse.items() if name not in BLOCK_SPARSE}
    check_names(here, "block_sparse")
    there = (additional or {}).get(KEY, {})
    if not isinstance(there, Mapping):
        raise ValueError(f'{_ADDITIONAL} is {there!r}; give an object such as {{"block_size": 128}}')
    check_names(there, _ADDITIONAL)
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            raise ValueError(
                f"{name} is {here[name]!r} in block_sparse, and {there[name]!r} in {_ADDITIONAL}; leave one of them out"
            )
    return {**there, **here}
