"""The OpenAPI document, where it differs from what FastAPI writes by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI


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
