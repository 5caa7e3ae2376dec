"""vllm-omni's real Wan transformer from small random weights: forward passes on forked ranks, and what they attended."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
        spec = {"backend": self.backend}
        if self.backend == "SP_SPARSE":
            spec |= {"block_sparse": self.block_sparse}  # type: ignore[dict-item]
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
    with built(rank, mesh, job) as (model, forward), torch.no_grad():
        layers = self_attentions(model)
        recorder = AttentionRecorder(keep_masks=True)
        for layer in layers:
            layer.record(recorder)
        outputs = [forward(step) for step in job.steps]
        masks = [(layer, mask.to_dense()) for _, layer, _, mask in recorder.masks]
        result = Result(
            torch.stack(outputs),
            masks,
            sum(layer.sparse_calls for layer in layers),
            sum(layer.dense_calls for layer in layers),
            model.blocks[0].attn1.attn.parallel_strategy.name,
        )
        torch.save(result, folder / str(rank))


@contextmanager
def built(rank: int, mesh: Mesh, job: Job) -> Iterator[tuple[Any, Callable[[int], Tensor]]]:
    """The model on this rank of an initialised process group, and its forward pass at a denoising step."""
    from vllm.config import DeviceConfig, VllmConfig
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import get_forward_context, set_forward_context
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel
    from vllm_omni.diffusion.registry import _apply_sequence_parallel_if_enabled
    from vllm_omni.plugins import load_omni_general_plugins

    load_omni_general_plugins()
    degrees = {"ulysses_degree": mesh.ulysses, "ring_degree": mesh.ring, "allgather_degree": mesh.allgather}
    config = OmniDiffusionConfig(
        model=None,
        model_class_name="WanPipeline",
        parallel_config=DiffusionParallelConfig(**degrees, **job.parallel),
        dtype="float32",
        diffusion_attention_config=job.attention_config(),
        additional_config={"sp_sparse": job.options},
    )
    vllm_config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    parallel_state.init_distributed_environment(world_size=mesh.ranks, rank=rank, local_rank=rank)
    parallel_state.initialize_model_parallel(sequence_parallel_size=mesh.ranks, **degrees)
    with set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config):
        with set_current_diffusion_config(config):
            model = WanTransformer3DModel(**SHAPE).eval()
        fill(model)
        pipeline = nn.Module()
        pipeline.transformer = model
        _apply_sequence_parallel_if_enabled(pipeline, config)

    generator = torch.Generator().manual_seed(1)
    frames, height, width = job.grid
    latents = torch.randn(1, SHAPE["in_channels"], frames, 2 * height, 2 * width, generator=generator)
    text = torch.randn(1, 7, SHAPE["text_dim"], generator=generator)

    def forward(step: int) -> Tensor:
        with set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config):
            get_forward_context().denoise_step_idx = step
            return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]

    yield model, forward


def fill(model: nn.Module) -> None:
    """Random weights by name, so that every rank has the same; large enough for attention far from uniform."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 0.3 if parameter.ndim > 1 else 0.1
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(
            values + (1.0 if name.endswith("norm_q.weight") or name.endswith("norm_k.weight") else 0.0)
        )


def self_attentions(model: nn.Module) -> list[Any]:
    """The `SparseSelfAttention` of each layer that has one."""
    from sp_sparse.integrations.vllm_omni.backend import SparseAttentionImpl

    found = [getattr(module, "attention", None) for module in model.modules()]
    return [impl.sparse for impl in found if isinstance(impl, SparseAttentionImpl) and impl.sparse is not None]
