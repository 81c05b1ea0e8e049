"""The server keeps what its OpenAPI document promises, whatever is sent: a few requests here, 2,000 in benchmarks/studies/serve."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.runtime
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models/{name}"])
def test_the_document_is_kept(path: str, server: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
    operation = schema[path]["GET" if "{" in path else "POST"]

    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy())
        if isinstance(case.body, dict):
            case.body["max_tokens"] = (
                1 if isinstance(case.body.get("max_tokens"), int) else case.body.get("max_tokens", 1)
            )
        case.call_and_validate(checks=CHECKS, timeout=30)

    send()
    assert server.raw("GET", "/health")[0] == 200
