"""Requests made up from the OpenAPI schema: none may bring the server down, and all answers are as documented."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import make_app
from tests.support.fake_engine import EOS, FakeClient, spell

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response}"),
    ("DELETE", "/v1/responses/{response}"),
    ("GET", "/v1/responses/{response}/input_items"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/conversations"),
    ("GET", "/v1/conversations/{conversation}"),
    ("POST", "/v1/conversations/{conversation}"),
    ("DELETE", "/v1/conversations/{conversation}"),
    ("GET", "/v1/conversations/{conversation}/items"),
    ("POST", "/v1/conversations/{conversation}/items"),
    ("GET", "/v1/conversations/{conversation}/items/{item}"),
    ("DELETE", "/v1/conversations/{conversation}/items/{item}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/conversations"),
    ("GET", "/conversations/{conversation}"),
    ("GET", "/v1/workers"),
    ("GET", "/v1/doctor"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def schema(tokenizer: Tokenizer) -> Any:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(tokenizer, engine, max_body_bytes=2**20))


PICKY = ("stream_options", "response_format", "tools", "tool_choice", "top_logprobs", "echo", "best_of")
KNOWN = {"model": "tiny", "conversation": "team/a"}
"""Parameters of paths, as there are some; nearly all made-up ones are a 404."""
CASES = [(GenerationMode.POSITIVE, *route) for route in ROUTES]
CASES += [(GenerationMode.NEGATIVE, *route) for route in ROUTES if route[0] == "POST"]


@pytest.mark.parametrize(("mode", "method", "path"), CASES)
def test_answers_are_as_documented(schema: Any, mode: GenerationMode, method: str, path: str) -> None:
    statuses = []

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case: schemathesis.Case) -> None:
        if len(statuses) % 2:
            if "response" in case.path_parameters:
                stored = (
                    schema["/v1/responses"]["POST"].Case(body={"input": "Hi"}, media_type="application/json").call()
                )
                case.path_parameters["response"] = stored.json()["id"]
                case.query.clear()
            known = KNOWN
            if path.startswith("/v1/conversations/{"):
                body = {"items": [{"role": "user", "content": "Hi"}]}
                made = schema["/v1/conversations"]["POST"].Case(body=body, media_type="application/json").call().json()
                listed = schema["/v1/conversations/{conversation}/items"]["GET"]
                items = listed.Case(path_parameters={"conversation": made["id"]}).call().json()
                known = {"conversation": made["id"], "item": items["first_id"]}
                case.query.clear()
            case.path_parameters.update({name: known[name] for name in case.path_parameters.keys() & known})
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # nearly all made-up names are a 404
            if len(statuses) % 2:  # half of the cases without what most made-up combinations are a 400 of
                for name in PICKY:
                    case.body.pop(name, None)
                for message in case.body.get("messages") or []:
                    message.setdefault("content", "Hi")
                    message["content"] = message["content"] or "Hi"
        statuses.append(case.call_and_validate(checks=CHECKS).status_code)

    check()
    assert mode is GenerationMode.NEGATIVE or 200 in statuses


def test_all_routes_are_tested(schema: Any) -> None:
    documented = {(op.ok().method.upper(), op.ok().path) for op in schema.get_all_operations()}
    elsewhere = {("GET", "/v1/events"), ("POST", "/v1/workers"), ("DELETE", "/v1/workers/{worker}")}
    assert documented == {*ROUTES, *elsewhere}  # a stream without end, and what starts and ends workers
