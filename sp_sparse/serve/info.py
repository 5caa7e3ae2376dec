"""What is served beside the videos: the model, health, metrics, the page, and the OpenAPI document."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from dataclasses import asdict
from importlib.resources import files
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from sp_sparse.serve.answers import ApiError, HealthAnswer, ModelAnswer, ModelList, error_answers
from sp_sparse.serve.service import Service


def add_server_routes(app: FastAPI, service: Service) -> None:
    """The model, health, metrics and the page."""
    started = int(time.time())

    def model() -> ModelAnswer:
        card, limits = asdict(service.backend.card), asdict(service.limits)
        return ModelAnswer(id=card.pop("name"), created=started, defaults=card, limits=limits)

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    def list_models() -> ModelList:
        """The one model of this server."""
        return ModelList(data=[model()])

    @app.get("/v1/models/{model_id:path}", response_model=ModelAnswer, responses=error_answers(404), tags=["models"])
    def get_model(model_id: str) -> ModelAnswer:
        """The model of this name."""
        if model_id != service.backend.card.name:
            raise ApiError(404, f"this server has {service.backend.card.name!r}", "model_not_found")
        return model()

    def health() -> HealthAnswer:
        # Without the store, which may be waiting for a disk.
        state: Literal["loading", "ready", "draining"] = "ready" if service.engine.ready else "loading"
        state = "draining" if service.engine.draining else state
        return HealthAnswer(live=True, ready=state == "ready", state=state)

    @app.get("/health", response_model=HealthAnswer, tags=["server"])
    @app.get("/health/live", response_model=HealthAnswer, tags=["server"])
    async def live() -> HealthAnswer:
        """200 while the process answers, whatever it is at."""
        return health()

    @app.get("/health/ready", response_model=HealthAnswer, responses={503: {"model": HealthAnswer}}, tags=["server"])
    async def ready() -> Response:
        """200 while jobs are run; 503 while the model loads or the server drains."""
        answer = health()
        return JSONResponse(answer.model_dump(), 200 if answer.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["server"])
    def metrics() -> Response:
        """For Prometheus."""
        text = service.metrics.exposition(service.store.counts(), service.engine.ready)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    text, headers = _page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)


def describe(app: FastAPI, needs_key: bool) -> None:
    """Leave out FastAPI's own form of refusals, which are OpenAI's here, and tell of the API key."""
    written = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = written()
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
                    if needs_key and path.startswith("/v1/"):
                        operation["security"] = [{"key": []}]
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            if needs_key:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _page() -> tuple[str, dict[str, str]]:
    """The page at `/`, one static file that talks to the API, and headers by which only its own script and style run."""
    text = files("sp_sparse.serve").joinpath("static/index.html").read_text(encoding="utf-8")
    script, style = (
        " ".join(_hash(found) for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; media-src 'self' blob:; "
        "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return text, headers


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
