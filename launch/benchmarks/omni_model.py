"""vllm-omni's own Wan transformer with random weights, on the ranks of a mesh of vllm-omni's, without its server.

It needs the Python part of vllm and vllm-omni alone: what is missing of vllm's compiled part has torch in its place.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Random weights give near-uniform attention, under which a wrong block hardly shows.
_NORM_SCALE = 2.0


@dataclass(frozen=True)
class OmniJob:
    """A transformer and the mesh that shares its sequence.

    Attributes:
        shape: arguments of WanTransformer3DModel.
        ulysses, ring, allgather: degrees of vllm-omni's sequence parallelism; ranks beyond their product hold replicas.
        attention: what --diffusion-attention-config would hold.
        options: what --additional-config would hold under "sp_sparse".
        parallel: further fields of DiffusionParallelConfig.
        device, dtype: where and in what the model computes.
    """

    shape: Mapping[str, Any]
    ulysses: int = 1
    ring: int = 1
    allgather: int = 1
    attention: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class OmniTransformer:
    """The model on this rank, and the configurations it runs under."""

    model: Any
    config: Any
    vllm_config: Any

    def __call__(self, latents: Tensor, text: Tensor, step: int, timestep: float = 500.0) -> Tensor:
        """A forward pass at a denoising step: latents `[1, C, T, H, W]` and text `[1, L, text_dim]` -> as the latents."""
        with self.context(step):
            return self.model(latents, torch.tensor([timestep], device=latents.device), text, return_dict=False)[0]

    @contextmanager
    def context(self, step: int | None) -> Iterator[None]:
        """vllm-omni's forward context, as its runner sets it for a request."""
        from vllm_omni.diffusion.forward_context import get_forward_context, set_forward_context

        with set_forward_context(vllm_config=self.vllm_config, omni_diffusion_config=self.config):
            get_forward_context().denoise_step_idx = step
            yield

    def sparse_layers(self) -> list[Any]:
        """The `SparseSelfAttention` of each layer that has one."""
        from sp_sparse.integrations.vllm_omni.backend import SparseAttentionImpl

        found = [getattr(module, "attention", None) for module in self.model.modules()]
        return [impl.sparse for impl in found if isinstance(impl, SparseAttentionImpl) and impl.sparse is not None]


def do_without_compiled_parts(pipelines: bool = False) -> None:
    """Stand in for what importing the transformer asks for and does not use. Call it before vllm is imported.

    Without its compiled part vllm cannot be imported for CUDA. So it is not to see the GPU, and its layers are torch's;
    vllm-omni sees it, and its attention, norms and groups are those of CUDA. And vllm-omni's Wan package imports its
    pipelines, with packages for video files.

    Args:
        pipelines: they are wanted.
    """
    compiled = "_C_stable_libtorch"
    if not any(_folder("vllm").glob(f"{compiled}*")):
        probe = "vllm.third_party.pynvml"
        sys.modules[probe] = None  # type: ignore[assignment]
        import vllm.platforms

        assert vllm.platforms.current_platform.is_unspecified()
        del sys.modules[probe]
        sys.modules[f"vllm.{compiled}"] = types.ModuleType(f"vllm.{compiled}")
    if pipelines:
        return
    name = "vllm_omni.diffusion.models.wan2_2"
    package = types.ModuleType(name)
    package.__path__ = [str(_folder("vllm_omni") / "diffusion" / "models" / "wan2_2")]
    sys.modules.setdefault(name, package)


@contextmanager
def omni_transformer(job: OmniJob) -> Iterator[OmniTransformer]:
    """The model on this rank of an initialised process group; its groups go with the context. A collective call."""
    from vllm.config import DeviceConfig, VllmConfig
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel
    from vllm_omni.diffusion.registry import _apply_sequence_parallel_if_enabled
    from vllm_omni.plugins import load_omni_general_plugins

    from sp_sparse.integrations.vllm_omni import register

    load_omni_general_plugins()
    register()  # by hand too: run from a checkout, sp_sparse has no entry points
    degrees = {"ulysses_degree": job.ulysses, "ring_degree": job.ring, "allgather_degree": job.allgather}
    config = OmniDiffusionConfig(
        model=None,
        model_class_name="WanPipeline",
        parallel_config=DiffusionParallelConfig(**degrees, **job.parallel),
        dtype=str(job.dtype).removeprefix("torch."),
        diffusion_attention_config=dict(job.attention),
        additional_config={"sp_sparse": dict(job.options)},
    )
    vllm_config = VllmConfig(device_config=DeviceConfig(device=job.device.type))
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel_state.init_distributed_environment(world_size=world, rank=rank, local_rank=job.device.index or 0)
    try:
        with set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config):
            size = job.ulysses * job.ring * job.allgather
            parallel_state.initialize_model_parallel(sequence_parallel_size=size, **degrees)
            with set_current_diffusion_config(config), set_default_torch_dtype(job.dtype), torch.device(job.device):
                model = WanTransformer3DModel(**job.shape).eval().requires_grad_(False)
            fill(model)
            pipeline = nn.Module()
            pipeline.transformer = model
            _apply_sequence_parallel_if_enabled(pipeline, config)
        yield OmniTransformer(model, config, vllm_config)
    finally:
        parallel_state.destroy_model_parallel()


def fill(model: nn.Module) -> None:
    """Random weights that depend on a parameter's name alone, so that every rank has the same."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.ndim > 1:
            parameter.data.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.data.fill_(_NORM_SCALE if ".norm_q." in name or ".norm_k." in name else 1.0)
        else:
            parameter.data.normal_(generator=generator).mul_(0.1)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f'{package} is not installed; pip install "sp-sparse[vllm]"')
    return Path(spec.origin).parent
