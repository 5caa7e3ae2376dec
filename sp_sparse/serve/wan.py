"""A Wan pipeline as the server's backend: each job becomes the arguments of `generate`, and runs through its code."""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sp_sparse import AttentionRecorder, SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.asked import check_video, fill_defaults
from sp_sparse.generate.attach import attach, build_mesh, prepare_transformers
from sp_sparse.generate.auto_mesh import with_mesh
from sp_sparse.generate.checks import checked_model
from sp_sparse.generate.decode import VideoDecoding
from sp_sparse.generate.files import save_video
from sp_sparse.generate.memory import DECODE, says_what_helps
from sp_sparse.generate.models import WanModel, fresh_scheduler, load_pipeline
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.report import attention_report, exchanges_told
from sp_sparse.generate.stages import StepClock, peak_bytes, synchronize
from sp_sparse.generate.start import Start
from sp_sparse.generate.video import EncodedPrompt, denoise, encode_prompt
from sp_sparse.integrations.diffusers import SparseWan
from sp_sparse.serve.arguments import ServeArguments
from sp_sparse.serve.backend import (
    IMAGE_NEVER,
    IMAGE_OPTIONAL,
    IMAGE_REQUIRED,
    JobParameters,
    Measured,
    ModelCard,
    NotFiniteError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Encoded:
    """What denoising needs beside the parameters of the job."""

    arguments: GenerateArguments
    prompt: EncodedPrompt
    start: Start


class WanBackend:
    """Every rank has one."""

    def __init__(self, arguments: ServeArguments, ranks: Ranks) -> None:
        """Finds the model without reading its weights.

        Raises:
            ValueError: degrees that do not fit the ranks, or no such model.
        """
        self._base, self._ranks = with_mesh(arguments.base(), ranks), ranks
        self._model = checked_model(self._base, ranks)
        if self._model.needs_last_image:
            raise ValueError(
                f"{self._base.model} makes videos between two images, and a request has one; make them with "
                "python -m sp_sparse.generate --image … --last-image …"
            )
        if self._model.takes_control:
            raise ValueError(
                f"{self._base.model} is VACE, and a request has neither its video nor its images; make them with "
                "python -m sp_sparse.generate"
            )
        check_video(fill_defaults(self._base, self._model), self._model)
        self._card = _card(arguments, self._model)
        self._recorder = AttentionRecorder()
        self._pipe: Any = None
        self._image_pipe: Any = None
        self._scheduler: Any = None
        self._mesh: SequenceParallelMesh | None = None
        self._attached: tuple[SparseAttentionConfig, SparseWan] | None = None

    @property
    def card(self) -> ModelCard:
        return self._card

    def check(self, job: JobParameters) -> None:
        """Everything that the ranks would refuse later."""
        check_video(self._arguments(job), self._model, named=str)

    def warm_up_job(self, steps: int) -> JobParameters:
        """A video as the model makes it if nothing is asked, in few steps."""
        card = self._card
        return JobParameters(
            prompt="warm-up",
            negative_prompt="",
            height=card.height,
            width=card.width,
            num_frames=card.num_frames,
            fps=card.fps,
            num_inference_steps=steps,
            seed=0,
            guidance_scale=card.guidance_scale,
        )

    def load(self) -> None:
        base, ranks = self._base, self._ranks
        self._pipe = ranks.together(lambda: load_pipeline(base, self._model, ranks.device))
        self._scheduler = self._pipe.scheduler
        self._image_pipe = _from_image(self._pipe) if self._model.may_take_image else self._pipe
        for pipe in (self._pipe, self._image_pipe):
            pipe.set_progress_bar_config(disable=True)
        self._mesh = ranks.together(lambda: build_mesh(base))
        ranks.together(lambda: self._attach(base.sparse))
        prepare_transformers(self._pipe, base, self._mesh)

    def encode(self, job: JobParameters) -> _Encoded:
        arguments, device = self._arguments(job), self._ranks.device
        prompt = encode_prompt(self._pipe, arguments, job.prompt, device)
        if job.image is None:
            start = Start.of(arguments, self._model)
        else:
            from PIL import Image

            start = Start(Image.open(io.BytesIO(job.image)).convert("RGB"))
        return _Encoded(arguments, prompt, start)

    def denoise(self, job: JobParameters, encoded: _Encoded, on_step: Callable[[], None]) -> Tensor:
        arguments, pipe = encoded.arguments, self._pipe if encoded.start.image is None else self._image_pipe
        # Made from the one that was loaded: another job's may have another shift, or have stopped amid its steps.
        scheduler = fresh_scheduler(self._scheduler, arguments.flow_shift)
        self._pipe.scheduler = self._image_pipe.scheduler = scheduler
        self._attach(arguments.sparse)
        self._recorder.clear()
        if self._ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._ranks.device)
        clock = _TellingClock(self._ranks.device, on_step)
        latents = denoise(pipe, arguments, encoded.prompt, clock, encoded.start)
        _check_finite("latents", latents)
        return latents

    def measure(self) -> Measured:
        assert self._mesh is not None  # no job comes before load
        assert self._attached is not None
        report = attention_report(self._attached[0], self._recorder, self._mesh)
        peak = max(self._ranks.gather(peak_bytes(self._ranks.device)))
        if report is None:
            return Measured(peak_bytes=peak)
        if report["kv_exchange"] and self._ranks.first:
            log.info("keys and values: %s", exchanges_told(report))
        return Measured(report["mean_density"], tuple(report["calls"].items()), peak)

    def decode(self, latents: Tensor, on_part: Callable[[int, int], None]) -> Tensor | None:
        decoding = VideoDecoding(self._pipe, latents, self._ranks)
        if self._base.vae_tiling and self._ranks.first:
            log.info("decode: %s", decoding)
        done = count(1)
        # The last part is heard by all ranks, so that a collective comes next only where all have done theirs.
        with says_what_helps(self._base.memory, DECODE):
            decoding.work(lambda: on_part(next(done), decoding.parts))
            frames = decoding.frames()
        if frames is None:
            return None
        _check_finite("frames", frames)
        return frames[0]

    def save(self, job: JobParameters, frames: Tensor, path: Path) -> None:
        save_video(frames, path, job.fps)

    def recover(self) -> None:
        gc.collect()
        synchronize(
            self._ranks.device
        )  # hangs where a collective was left half-done, and the watchdog ends the process
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        assert self._mesh is not None
        for group in self._mesh.groups:
            size = dist.get_world_size(group)
            mine = torch.tensor([dist.get_rank(group)], device=self._ranks.device)
            every = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(every, mine, group=group)
            if [int(other) for other in every] != list(range(size)):
                raise RuntimeError("the ranks' communication is out of step after a failed job")

    def _arguments(self, job: JobParameters) -> GenerateArguments:
        filled = replace(
            self._base,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            height=job.height,
            width=job.width,
            num_frames=job.num_frames,
            fps=job.fps,
            num_inference_steps=job.num_inference_steps,
            seed=job.seed,
            guidance_scale=job.guidance_scale,
            guidance_scale_2=job.guidance_scale_2,
            flow_shift=self._base.flow_shift if job.flow_shift is None else job.flow_shift,
            sparse=self._sparse(job),
        )
        return fill_defaults(filled, self._model)

    def _sparse(self, job: JobParameters) -> SparseAttentionConfig:
        config = self._base.sparse
        if job.sparse_backend == "none" and config.backend != "none":
            if self._base.ranks_wanted == 1:
                return replace(config, backend="none")
            # diffusers' own parallelism cannot be undone, so dense attention on several ranks is the layer's.
            return replace(
                config,
                topk=1.0,
                topk_2=None,
                schedule="constant",
                schedule_2=None,
                schedule_table=(),
                schedule_table_2=(),
            )
        if job.sparse_topk is not None:
            config = replace(config, topk=job.sparse_topk, topk_2=None)
        if job.sparse_schedule is not None:
            config = replace(
                config, schedule=job.sparse_schedule, schedule_2=None, schedule_table=(), schedule_table_2=()
            )
        if job.sparse_topk is not None:
            config.check_read(("topk",))
        return config

    def _attach(self, config: SparseAttentionConfig) -> None:
        """Make attention what `config` says; nothing happens where it is that already. A collective call."""
        assert self._mesh is not None
        if self._attached is not None:
            if self._attached[0] == config:
                return
            self._attached[1].remove()
            self._attached = None
        self._attached = config, attach(self._pipe, config, self._mesh, self._recorder)


class _TellingClock(StepClock):
    """Tells the server of each step, once the GPU has done it."""

    def __init__(self, device: torch.device, on_step: Callable[[], None]) -> None:
        super().__init__(device)
        self._on_step = on_step

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told = super().__call__(pipe, step, timestep, tensors)
        self._on_step()
        return told


def _check_finite(what: str, values: Tensor) -> None:
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise NotFiniteError(
            f"{wrong} of {values.numel()} {what} of this video are not finite; ask for sparse_attn_backend 'none', another "
            "seed or less guidance_scale, or start the server with --dtype float32"
        )


def _card(arguments: ServeArguments, model: WanModel) -> ModelCard:
    image = IMAGE_OPTIONAL if model.may_take_image else IMAGE_NEVER
    if model.takes_image and not model.draws_image:
        image = IMAGE_REQUIRED
    sparse = arguments.sparse
    return ModelCard(
        name=arguments.model_name,
        **vars(model.defaults),
        pixel_multiple=model.spatial_multiple,
        frame_multiple=model.temporal_multiple,
        image=image,
        two_experts=model.experts > 1,
        sparse_backend=sparse.backend,
        sparse_topk=sparse.topk,
        sparse_schedule=sparse.schedule,
    )


def _from_image(pipe: Any) -> Any:
    """The same weights and scheduler, starting from an image."""
    from diffusers import WanImageToVideoPipeline

    if isinstance(pipe, WanImageToVideoPipeline):
        return pipe
    kept = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2")
    return WanImageToVideoPipeline(**{name: getattr(pipe, name) for name in kept}, expand_timesteps=True)
