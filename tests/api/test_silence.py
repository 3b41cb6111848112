"""Streams that have nothing to say for a while: they say so, in each API's own way, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, make_app
from tests.support.fake_engine import EOS, FakeClient, spell

HI = [{"role": "user", "content": "Hi"}]
EVENT = 'event: ping\ndata: {"type":"ping"}\n\n'
ROUTES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"messages": HI}, ": ping\n\n"),
    ("/v1/completions", {"prompt": "Hi"}, ": ping\n\n"),
    ("/v1/responses", {"input": "Hi"}, ": ping\n\n"),
    ("/v1/messages", {"messages": HI, "max_tokens": 9}, EVENT),
]  # fmt: skip


def slow(tokenizer: Tokenizer, pause: float, **config: Any) -> Api:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS, pause=pause)
    return Api(make_app(tokenizer, engine, **config), engine)


@pytest.mark.parametrize(("path", "body", "ping"), ROUTES)
async def test_a_silent_stream_says_that_it_lives(
    tokenizer: Tokenizer, path: str, body: dict[str, Any], ping: str
) -> None:
    api = slow(tokenizer, pause=0.25, sse_ping=0.1)
    text = (await api.http.post(path, json={**body, "stream": True})).text
    assert text.count(ping) >= 6
    quiet = slow(tokenizer, pause=0.0, sse_ping=0.0)
    expected = (await quiet.http.post(path, json={**body, "stream": True})).text

    def said(text: str) -> str:
        found = ""
        for block in text.split("\n\n"):
            for line in block.split("\n"):
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    delta = event.get("delta") or {}
                    for choice in event.get("choices", []):
                        found += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    found += delta if isinstance(delta, str) else delta.get("text") or ""
        return found

    assert said(text) == said(expected) == "Hello"


async def test_a_stream_that_speaks_has_no_pings(tokenizer: Tokenizer) -> None:
    api = slow(tokenizer, pause=0.01, sse_ping=5.0)
    assert ": ping" not in (await api.chat(stream=True)).text
