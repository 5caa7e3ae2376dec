"""The HTTP interface: the application, and its routes for videos, which are OpenAI's with what sparse attention adds."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

import sp_sparse
from sp_sparse.serve.answers import (
    ApiError,
    DeletedAnswer,
    VideoAnswer,
    VideoPage,
    error_answers,
    invalid,
    not_found,
)
from sp_sparse.serve.body import read_request, request_body
from sp_sparse.serve.disk import StoreError, is_no_room
from sp_sparse.serve.guard import Guard, body_is_done, hold_body
from sp_sparse.serve.images import image_from_url, image_size, stored_image
from sp_sparse.serve.info import add_server_routes, describe
from sp_sparse.serve.jobs import COMPLETED, FAILED, Job
from sp_sparse.serve.requests import job_parameters
from sp_sparse.serve.service import Service

_POLL_S = 0.1

log = logging.getLogger(__name__)

VideoId = Annotated[str, Path(pattern=r"^video_[0-9a-f]{32}$")]


def create_app(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="sp_sparse video server",
        version=sp_sparse.__version__,
        redoc_url=None,
        responses=error_answers(400, 401, 403, 408, 429, 503, 507),
    )
    app.add_middleware(
        Guard, limits=service.limits, metrics=service.metrics, api_key=service.api_key, host=service.host
    )
    _add_error_handlers(app)
    _add_video_routes(app, service)
    _add_sync_route(app, service)
    add_server_routes(app, service)
    describe(app, service.api_key is not None)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def not_valid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        if first["loc"][0] == "path":
            return not_found("there is no such video; what was asked for").response()
        return invalid(f"{name}: {first['msg']}", name).response()

    async def of_starlette(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {})).response()

    async def not_stored(request: Request, error: Exception) -> Response:
        log.error("%s %s is refused: %s", request.method, request.url.path, error)
        headers = {"Retry-After": "30"}
        if is_no_room(error):
            return ApiError(
                507, "the server's disk is full; try again when there is room", "no_room", None, headers
            ).response()
        return ApiError(
            503, "the server's database cannot be used now; try again", "database", None, headers
        ).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log tells why", "internal_error").response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_starlette)
    app.add_exception_handler(StoreError, not_stored)
    app.add_exception_handler(Exception, unexpected)


async def _create(service: Service, request: Request) -> Job:
    """From a request to a queued job."""
    asked, data = await read_request(request)
    url = asked.image_url()
    if url is not None:
        if data is not None:
            raise invalid("the first frame is given as a file and as an address; give one", "input_reference")
        hold_body(request.scope, service.limits.body_bytes)
        data = await image_from_url(url, service.limits)

    picture = None if data is None else await service.decoders.run(image_size, data, service.limits)
    parameters = job_parameters(asked, picture, service.backend.card, service.limits)
    if data is not None:
        image = await service.decoders.run(stored_image, data, parameters.width, parameters.height)
        parameters = replace(parameters, image=image)
    job = await run_in_threadpool(service.add, parameters)
    body_is_done(request.scope)
    return job


def _add_video_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/videos",
        response_model=VideoAnswer,
        responses=error_answers(404, 413, 415, 503),
        openapi_extra={"requestBody": request_body()},
        tags=["videos"],
    )
    async def create_video(request: Request) -> VideoAnswer:
        """Queue a video. The answer is the job; ask for it again to see it progress."""
        job = await _create(service, request)
        return await run_in_threadpool(service.answer, job)

    @app.get("/v1/videos", response_model=VideoPage, tags=["videos"])
    def list_videos(
        after: Annotated[str | None, Query(pattern=r"^video_[0-9a-f]{32}$")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoPage:
        """Jobs, newest first, page by page."""
        try:
            jobs, more = service.store.list(after, limit, order == "asc")
        except KeyError as error:
            raise invalid(f"after: there is no {after}", "after") from error
        first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
        return VideoPage(data=[service.answer(job) for job in jobs], first_id=first, last_id=last, has_more=more)

    @app.get("/v1/videos/{video_id}", response_model=VideoAnswer, responses=error_answers(404), tags=["videos"])
    def get_video(video_id: VideoId) -> VideoAnswer:
        """A job as it stands."""
        return service.answer(service.job(video_id))

    content: dict[int | str, dict[str, Any]] = {
        200: {"content": {"video/mp4": {}}},
        206: {"content": {"video/mp4": {}}, "description": "The part of the file that was asked for by Range."},
        416: {"content": {"text/plain": {}}, "description": "A Range that the file has not."},
    }

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=FileResponse,
        responses={**content, **error_answers(404, 422)},
        tags=["videos"],
    )
    @app.head("/v1/videos/{video_id}/content", include_in_schema=False)
    def get_content(video_id: VideoId, variant: Literal["video"] = "video") -> FileResponse:
        """The mp4; parts of it by Range."""
        job = service.job(video_id)
        if job.status == FAILED:
            raise ApiError(422, f"{video_id} failed: {job.error and job.error.message}", "video_failed")
        path = service.store.video_path(video_id)
        if job.status != COMPLETED or not path.is_file():
            raise ApiError(404, f"{video_id} has no video yet; ask again when its status is completed", "not_ready")
        return FileResponse(path, media_type="video/mp4", filename=f"{video_id}.mp4", content_disposition_type="inline")

    @app.delete(
        "/v1/videos/{video_id}", response_model=DeletedAnswer, responses=error_answers(404, 409), tags=["videos"]
    )
    def delete_video(video_id: VideoId) -> DeletedAnswer:
        """Remove a job and its video; one that runs stops at its next step."""
        service.delete(video_id)
        return DeletedAnswer(id=video_id)


def _add_sync_route(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/videos/sync",
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": {}}}, **error_answers(404, 413, 415, 422, 503)},
        openapi_extra={"requestBody": request_body()},
        tags=["videos"],
    )
    async def create_video_and_wait(request: Request) -> Response:
        """Make a video and answer with the mp4. A client that leaves cancels it."""
        job_id = (await _create(service, request)).id
        job = await _ended(service, request, job_id)
        if job is None:
            raise ApiError(404, f"{job_id} was deleted meanwhile", "not_found")
        if job.status == FAILED:
            raise ApiError(422, f"{job_id} failed: {job.error and job.error.message}", "video_failed")
        answer = await run_in_threadpool(service.answer, job)
        headers = {
            "X-Request-Id": job_id,
            "X-Model": service.backend.card.name,
            "X-Inference-Time-S": f"{answer.inference_time_s:.3f}",
            "X-Stage-Durations": json.dumps(answer.stage_durations),
            "X-Peak-Memory-MB": f"{answer.peak_memory_mb:.0f}",
        }
        return FileResponse(service.store.video_path(job_id), media_type="video/mp4", headers=headers)


async def _ended(service: Service, request: Request, job_id: str) -> Job | None:
    """The job when it has ended; None if it was deleted, for one by the client's leaving."""
    while True:
        job = await run_in_threadpool(service.store.get, job_id)
        if job is None or job.status in (COMPLETED, FAILED):
            return job
        if await request.is_disconnected():
            with suppress(ApiError):
                await run_in_threadpool(service.delete, job_id)
            return None
        await asyncio.sleep(_POLL_S)
