"""The API over a fake engine, for tests that see it as its clients do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx
import uvicorn

from miniserve.api.app import create_app
from miniserve.api.middleware import Connection
from miniserve.api.service import Service
from miniserve.config import EngineConfig, ServeConfig
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer
from tests.support.fake_engine import FakeClient

HI = [{"role": "user", "content": "Hi"}]
PROMPT = list(b"user: Hi\nassistant:")
JSON = {"Content-Type": "application/json"}


compiler = cache(Compiler)
"""One for each tokenizer: it takes a tenth of a second."""


def make_app(tokenizer: Tokenizer, engine: FakeClient, defaults: dict[str, Any] | None = None, **config: Any) -> Any:
    names = config.pop("served_model_names", ["tiny", "alias"])
    settings = ServeConfig(engine=EngineConfig(model="tiny"), served_model_names=names, **config)
    return create_app(Service(settings, engine, tokenizer, defaults or {}, compiler(tokenizer)), engine.feed)


@cache
def shared_app(tokenizer: Tokenizer, engine: type[FakeClient] = FakeClient, **config: Any) -> tuple[Any, FakeClient]:
    """An app and its engine, made once: an app takes a tenth of a second."""
    made = engine()
    return make_app(tokenizer, made, **config), made


def reset(engine: FakeClient, **play: Any) -> None:
    """Let an engine forget what it was asked and how to refuse; `play` are its turns to come."""
    vars(engine).update(play=lambda tokens, params: play, turns=[], refuse=None, unhealthy_reason="")


class Api:
    """A client of an app over `engine`."""

    def __init__(self, app: Any, engine: FakeClient) -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")
        self.engine = engine

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json={"messages": HI, **body})

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"prompt": "Hi", **body})


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event; the stream must end in [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    return [json.loads(line[6:]) for line in lines[:-2]]


def deltas(chunks: list[Any], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk.get("choices", []) if c["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """A real server on a free port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await task
