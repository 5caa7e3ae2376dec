"""What clients are told, errors included, as the OpenAPI document describes it."""

from __future__ import annotations

from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sp_sparse.serve.backend import ModelCard
from sp_sparse.serve.jobs import COMPLETED, IN_PROGRESS, QUEUED, Job, Progress

# Of errors, in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused, with what the client should change."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        body = {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        return JSONResponse(body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request with something in it that cannot be."""
    return ApiError(400, message, code, param)


def not_found(what: str) -> ApiError:
    return ApiError(404, f"{what} is not here", "not_found")


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for the OpenAPI document."""
    return {status: {"model": ErrorAnswer} for status in statuses}


class JobErrorAnswer(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class VideoAnswer(BaseModel):
    """A job and how far it has come."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Percent.")
    prompt: str
    negative_prompt: str
    size: str
    seconds: str
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    error: JobErrorAnswer | None
    remixed_from_video_id: None = None
    phase: Literal["queued", "encode", "denoise", "decode", "save"] | None = Field(
        description="Of a job not ended yet."
    )
    cancelling: bool = Field(description="Deleted, and about to stop.")
    step: int = Field(description="Denoising steps done.")
    steps: int
    seconds_per_step: float | None
    eta_s: float | None = Field(description="Seconds until the end of a running job, as far as is known.")
    jobs_ahead: int | None = Field(description="Of a queued job.")
    tries: int = Field(description="How often the job was started.")
    fps: int
    num_frames: int
    seed: int
    guidance_scale: float
    sparse_attn_backend: str
    sparse_attn_topk: float | None
    sparse_attn_schedule: str | None
    density: float | None = Field(description="Attended share of the pairs, measured; of a completed job.")
    kernel_calls: dict[str, int]
    inference_time_s: float | None
    stage_durations: dict[str, float]
    peak_memory_mb: float | None
    media_type: Literal["video/mp4"] = "video/mp4"
    file_name: str


class VideoPage(BaseModel):
    """Jobs, one page of them."""

    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAnswer(BaseModel):
    """A job that is gone, or goes at its next step."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelAnswer(BaseModel):
    """The model of this server, with what it makes if nothing is asked and what it refuses."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sp_sparse"] = "sp_sparse"
    defaults: dict[str, Any]
    limits: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class HealthAnswer(BaseModel):
    """`live`: the process answers. `ready`: jobs are being run."""

    live: bool
    ready: bool
    state: Literal["loading", "ready", "draining"]


def video_answer(
    job: Job, card: ModelCard, progress: Progress | None, jobs_ahead: int | None, keep_s: float
) -> VideoAnswer:
    """`progress` is that of a job in progress, where it is known; `jobs_ahead` of a queued one."""
    asked, result = job.parameters, job.result
    dense = asked["sparse_backend"] == "none" or card.sparse_backend == "none"
    steps = asked["num_inference_steps"]
    durations = result.get("stage_durations", {})
    percent = {QUEUED: 0, COMPLETED: 100}.get(job.status, progress.percent if progress else 0)
    phase = {QUEUED: "queued", IN_PROGRESS: progress.phase if progress else "encode"}.get(job.status)
    return VideoAnswer.model_validate(
        {
            "id": job.id,
            "model": card.name,
            "status": job.status,
            "progress": percent,
            "prompt": asked["prompt"],
            "negative_prompt": asked["negative_prompt"],
            "size": f"{asked['width']}x{asked['height']}",
            "seconds": f"{asked['num_frames'] / asked['fps']:.3g}",
            "created_at": int(job.created_at),
            "started_at": _whole(job.started_at),
            "completed_at": _whole(job.completed_at),
            "expires_at": None if job.completed_at is None else int(job.completed_at + keep_s),
            "error": None if job.error is None else {"code": job.error.code, "message": job.error.message},
            "phase": phase,
            "cancelling": job.cancelling,
            "step": steps if job.status == COMPLETED else progress.step if progress else 0,
            "steps": steps,
            "seconds_per_step": progress.seconds_per_step if progress else result.get("seconds_per_step"),
            "eta_s": progress.eta_s if progress else None,
            "jobs_ahead": jobs_ahead,
            "tries": job.tries,
            "fps": asked["fps"],
            "num_frames": asked["num_frames"],
            "seed": asked["seed"],
            "guidance_scale": asked["guidance_scale"],
            "sparse_attn_backend": "none" if dense else card.sparse_backend,
            "sparse_attn_topk": None if dense else asked["sparse_topk"] or card.sparse_topk,
            "sparse_attn_schedule": None if dense else asked["sparse_schedule"] or card.sparse_schedule,
            "density": result.get("density"),
            "kernel_calls": dict(result.get("kernel_calls", ())),
            "inference_time_s": sum(durations.values()) if durations else None,
            "stage_durations": durations,
            "peak_memory_mb": result["peak_bytes"] / 2**20 if result else None,
            "file_name": f"{job.id}.mp4",
        }
    )


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
