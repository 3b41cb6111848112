"""Bodies that are no requests, and what clients get when the server cannot or will not answer."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from miniserve.dispatcher import EngineError
from miniserve.scheduler.scheduler import QueueFull
from miniserve.text.messages import MAX_DEPTH
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, JSON, Api, deltas, error_of, events, make_app
from tests.support.fake_engine import FakeClient

# --- bodies ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    """Objects and lists `depth` deep."""
    value: Any = 1
    for level in range(depth, 1, -1):
        value = [value] if level % 2 else {"x": value}
    return {"x": value}


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500])
async def test_deep_json(tokenizer: Tokenizer, depth: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeClient(steps=[[65]])
    engine.max_model_len = 10_000
    api = Api(make_app(tokenizer, engine), engine)
    for path in ("/v1/chat/completions", "/tokenize"):
        for allowed in (True, False):
            value = nested(MAX_DEPTH if allowed else depth)
            inner = nested((MAX_DEPTH if allowed else depth) - 2)
            function = {"name": "f", "arguments": inner}
            call = [*HI, {"role": "assistant", "tool_calls": [{"function": function}]}]
            for body, param in (
                ({"messages": HI, "chat_template_kwargs": {"thinking": value["x"]}}, "chat_template_kwargs"),
                ({"messages": call}, "messages[1].tool_calls[0]"),
            ):
                response = await api.http.post(path, json=body)
                if allowed:
                    assert response.status_code == 200, response.text
                else:
                    error = error_of(response, 400)
                    assert "nested too deeply" in error["message"]
                    assert error["param"] == param
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_half_surrogates_in_free_form_json(api: Api) -> None:
    for where in ({"tool_calls": [{"a": ["\ud800"]}]}, {"tool_calls": [{"\ud800": 1}]}):
        content = json.dumps({"messages": [{"role": "assistant", **where}]})
        error = error_of(await api.http.post("/tokenize", content=content, headers=JSON), 400)
        assert error["param"] == "messages[0].tool_calls[0]"
        assert "surrogate" in error["message"]
    content = json.dumps({"messages": HI, "chat_template_kwargs": {"x": "\ud800"}})
    assert error_of(await api.http.post("/tokenize", content=content, headers=JSON), 400)["param"] == (
        "chat_template_kwargs"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "in position 43: invalid start byte): send JSON"),
        (b'{"messages": ' + b"[" * 100_000, "recursion"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "4300 digits"),
        (gzip.compress(json.dumps({"messages": HI}).encode()), "not compressed (no gzip, no `Content-Encoding`)"),
    ],
    ids=["latin-1", "deep", "digits", "gzip"],
)
async def test_bodies_that_python_cannot_read(api: Api, content: bytes, words: str) -> None:
    error = error_of(await api.http.post("/v1/chat/completions", content=content, headers=JSON), 400)
    assert error["code"] == "invalid_json"
    assert words in error["message"]


async def test_bodies_that_are_no_requests(api: Api) -> None:
    async def post(content: bytes, kind: str | None = "application/json") -> httpx.Response:
        headers = {"Content-Type": kind} if kind else {}
        return await api.http.post("/v1/chat/completions", content=content, headers=headers)

    assert error_of(await post(b'{"a": '), 400)["code"] == "invalid_json"
    for response in (
        await post(b""),
        await post(b"[]"),
        await post(b"\xff\xfe\xfd"),
        await post(json.dumps({"messages": HI}).encode(), "text/plain"),
        await post(b'{"messages":' + b"[" * 100_000),
        await post(b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
    ):
        error_of(response, 400)
    assert "Content-Type: application/json" in error_of(await post(b"{}", None), 400)["message"]
    missing = error_of(await post(b"{}"), 400)
    assert (missing["param"], missing["code"]) == ("messages", "missing_required_parameter")


# --- refusals and failures --------------------------------------------------------------------------------------------


async def test_routing_errors(api: Api) -> None:
    assert error_of(await api.chat(model="gpt-4"), 404)["code"] == "model_not_found"
    assert "GET /nowhere" in error_of(await api.http.get("/nowhere"), 404)["message"]
    response = await api.http.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    assert len((await api.http.get("/version", headers={"X-Request-Id": "a b"})).headers["x-request-id"]) == 32


async def test_api_key(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[[65]])
    api = Api(make_app(tokenizer, engine, api_key="sécret"), engine)
    assert (await api.http.get("/health")).status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s\u00e9cret".encode()}):
            response = await api.http.get(path, headers=given)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
    response = await api.http.get("/v1/models", headers={"Authorization": "bearer sécret".encode()})
    assert response.status_code == 200


async def test_body_limit(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[[65]])
    api = Api(make_app(tokenizer, engine, max_body_bytes=1000), engine)

    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    for response in (
        await api.chat(user="x" * 1000),
        await api.http.post("/tokenize", content=chunked(), headers=JSON),
        await api.http.post("/tokenize", headers=JSON | {"Content-Length": "9" * 5000}),
    ):
        error_of(response, 413)
        assert response.headers["connection"] == "close"
    assert (await api.chat()).status_code == 200


async def test_the_engine_refuses(api: Api) -> None:
    api.engine.refuse = QueueFull("1024 requests wait already: try again later.", 7)
    for stream in (False, True):
        response = await api.chat(stream=stream)
        assert error_of(response, 503)["code"] == "queue_full"
        assert response.headers["retry-after"] == "7"
    api.engine.refuse = EngineError("No decoder is alive.")
    response = await api.complete()
    assert error_of(response, 503)["message"] == "No decoder is alive."
    assert "retry-after" in response.headers
    api.engine.unhealthy_reason = "d0 is gone."
    assert error_of(await api.http.get("/health"), 503)["message"] == "d0 is gone."


async def test_the_engine_fails(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": [[65], [66]], "finish": "error", "error": "Out of luck."}
    assert error_of(await api.chat(), 500)["message"] == "Out of luck."
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks[:-1]) == "A"
    assert chunks[-1]["error"]["message"] == "Out of luck."
    api.engine.play = lambda tokens, params: {"steps": [[65]], "finish": "abort"}
    error_of(await api.chat(), 503)
    api.engine.play = lambda tokens, params: {}
    error_of(await api.chat(), 503)


async def test_unexpected_errors_reveal_nothing(api: Api) -> None:
    api.engine.refuse = KeyError("internal secret")
    response = await api.http.post("/v1/chat/completions", json={"messages": HI}, headers={"X-Request-Id": "r1"})
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "r1"
    api.engine.refuse = None
    api.engine.play = lambda tokens, params: {"steps": [[65], ["secret"]]}
    chunks = events(await api.chat(stream=True))
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(chunks)
