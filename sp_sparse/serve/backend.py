"""What the server asks of whatever makes the videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

IMAGE_NEVER, IMAGE_OPTIONAL, IMAGE_REQUIRED = "never", "optional", "required"


@dataclass(frozen=True)
class ModelCard:
    """What clients are told of the model, and what fills what their requests leave open.

    Attributes:
        name: the `model` of requests and answers.
        prompt: what the page suggests.
        height, width, num_frames, fps, num_inference_steps, guidance_scale: of a video for which nothing is asked.
        pixel_multiple: heights and widths are multiples of it.
        frame_multiple: numbers of frames are a multiple of it, plus one.
        image: whether a first frame is `never`, `optional` or `required`.
        two_experts: whether `guidance_scale_2` has a meaning.
        sparse_backend, sparse_topk, sparse_schedule: sparse attention of a request that asks for nothing else.
    """

    name: str
    prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    pixel_multiple: int
    frame_multiple: int
    image: str
    two_experts: bool
    sparse_backend: str
    sparse_topk: float
    sparse_schedule: str


@dataclass(frozen=True)
class JobParameters:
    """One video, complete: every rank gets the same from rank 0 and takes no decision of its own.

    None stands for the server's own value.

    Attributes:
        seed: of the noise.
        image: the first frame as PNG, 8-bit RGB.
        sparse_backend: `none` for dense attention.
        sparse_topk, sparse_schedule: in place of the server's.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    seed: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    sparse_backend: str | None = None
    sparse_topk: float | None = None
    sparse_schedule: str | None = None
    image: bytes | None = None


@dataclass(frozen=True)
class Measured:
    """What a job really did, over all ranks.

    Attributes:
        density: attended pairs over all pairs; None where attention was the model's own.
        kernel_calls: calls of each kernel on rank 0.
        peak_bytes: most memory of a rank.
    """

    density: float | None = None
    kernel_calls: tuple[tuple[str, int], ...] = ()
    peak_bytes: int = 0


class NotFiniteError(ArithmeticError):
    """A video that holds what is no number."""


class VideoBackend(Protocol):
    """Makes videos. "All ranks" methods are called by every rank in the same order with the same arguments."""

    @property
    def card(self) -> ModelCard: ...

    def check(self, job: JobParameters) -> None:
        """Refuse, with a ValueError that tells the client what to change, what could not run. Rank 0, any thread, early."""

    def load(self) -> None:
        """Make everything ready. All ranks."""

    def encode(self, job: JobParameters) -> Any:
        """What denoising needs of prompt and image. All ranks."""

    def denoise(self, job: JobParameters, encoded: Any, on_step: Callable[[], None]) -> Any:
        """The latents; `on_step` is called after each step and may raise. All ranks."""

    def measure(self) -> Measured:
        """What the job that was denoised last did. All ranks."""

    def decode(self, latents: Any, on_part: Callable[[int, int], None]) -> Any:
        """The frames, on rank 0. `on_part(done, of)` is called equally often on every rank, and may raise. All ranks.

        A rank has nothing left that could fail alone before a collective of its own, once the last `on_part` has returned.
        """

    def save(self, job: JobParameters, frames: Any, path: Path) -> None:
        """Write an mp4, whole or not at all. Rank 0."""

    def recover(self) -> None:
        """Make sure that a failed job left nothing behind, above all no half-done communication. All ranks.

        Raises:
            RuntimeError: it did, and the process cannot go on.
        """
