"""The server against its own OpenAPI document: schemathesis makes requests that fit it and such that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.fake import LocalServer

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("POST", "/v1/videos"),
    ("POST", "/v1/videos/sync"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/{video_id}"),
    ("GET", "/v1/videos/{video_id}/content"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("schema"), queue=10_000) as started:
        yield started


@pytest.fixture(scope="module")
def api(server: LocalServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_tried(api: Any) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented(server: LocalServer, api: Any, method: str, path: str) -> None:
    operation = api[path][method]

    def check(mode: Any, checks: list[Any]) -> None:
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def calls(case: Any) -> None:
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=checks)
            assert "Traceback" not in answer.text

        calls()

    check(GenerationMode.POSITIVE, CHECKS)
    # What takes no parameters and no body cannot be asked for wrongly.
    if method == "POST" or path == "/v1/videos":
        check(GenerationMode.NEGATIVE, [*CHECKS, negative_data_rejection])
    assert server.http.get("/health/ready").status_code == 200
