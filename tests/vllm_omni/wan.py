"""vllm-omni's real Wan transformer from small random weights: forward passes on forked ranks, and what they attended."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.benchmarks.omni_model import OmniJob, OmniTransformer, omni_transformer
from sp_sparse import AttentionRecorder
from tests.ranks import run_ranks

SHAPE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def has_ulysses_allgather() -> bool:
    """Whether vllm-omni composes Ulysses with all-gathered keys, which 0.30 refuses."""
    return not version("vllm-omni").startswith("0.30.")


@dataclass(frozen=True)
class Mesh:
    """Degrees of vllm-omni's sequence parallelism."""

    ulysses: int = 1
    ring: int = 1
    allgather: int = 1

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring * self.allgather


@dataclass(frozen=True)
class Job:
    """A forward pass of a fresh model.

    Attributes:
        grid: tokens of the video along time, height and width.
        block_sparse, options: the fields of `block_sparse`, and of "sp_sparse" in additional_config.
        backend: of role `self`; `cross` has vllm-omni's default.
        steps: denoising steps to run, one after the other, on the same latents.
        parallel: further fields of DiffusionParallelConfig.
        default: backend of the roles that have none of their own.
    """

    grid: tuple[int, int, int]
    block_sparse: dict[str, Any] = field(default_factory=lambda: {"sparsity": 0.6})
    options: dict[str, Any] = field(default_factory=lambda: {"block_size": 16})
    backend: str = "SP_SPARSE"
    steps: tuple[int, ...] = (3,)
    parallel: dict[str, Any] = field(default_factory=dict)
    default: str | None = None

    def attention_config(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"backend": self.backend}
        if self.backend == "SP_SPARSE":
            spec["block_sparse"] = self.block_sparse
        config: dict[str, Any] = {"per_role": {"self": spec}}
        return config | ({"default": {"backend": self.default}} if self.default else {})


@dataclass
class Result:
    """What a rank saw.

    Attributes:
        output: the model's at each step, `[steps, B, C, T, H, W]`, whole on every rank.
        masks: (layer, dense bool mask of this rank's heads and query blocks) of each sparse call.
        sparse, dense: calls of self-attention by kind.
        strategy: vllm-omni's name of how the ranks share the sequence.
    """

    output: Tensor
    masks: list[tuple[int, Tensor]]
    sparse: int
    dense: int
    strategy: str


def run(mesh: Mesh, job: Job) -> list[Result]:
    """Run a job on forked ranks; the result of each."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(mesh.ranks, _rank, mesh, job, Path(folder))
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(mesh.ranks)]


def _rank(rank: int, mesh: Mesh, job: Job, folder: Path) -> None:
    with built(mesh, job) as (transformer, forward), torch.no_grad():
        layers = transformer.sparse_layers()
        recorder = AttentionRecorder(keep_masks=True)
        for layer in layers:
            layer.record(recorder)
        outputs = [forward(step) for step in job.steps]
        result = Result(
            torch.stack(outputs),
            [(layer, mask.to_dense()) for _, layer, _, mask in recorder.masks],
            sum(layer.sparse_calls for layer in layers),
            sum(layer.dense_calls for layer in layers),
            transformer.model.blocks[0].attn1.attn.parallel_strategy.name,
        )
        torch.save(result, folder / str(rank))


@contextmanager
def built(mesh: Mesh, job: Job) -> Iterator[tuple[OmniTransformer, Callable[[int], Tensor]]]:
    """The model on a rank of an initialised process group, and its forward pass at a denoising step."""
    omni_job = OmniJob(
        SHAPE,
        mesh.ulysses,
        mesh.ring,
        mesh.allgather,
        attention=job.attention_config(),
        options=job.options,
        parallel=job.parallel,
    )
    generator = torch.Generator().manual_seed(1)
    frames, height, width = job.grid
    latents = torch.randn(1, SHAPE["in_channels"], frames, 2 * height, 2 * width, generator=generator)
    text = torch.randn(1, 7, SHAPE["text_dim"], generator=generator)
    with omni_transformer(omni_job) as transformer:
        yield transformer, lambda step: transformer(latents, text, step)
