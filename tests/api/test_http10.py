"""Clients that speak HTTP/1.0: no chunks, and connections that stay only if they ask."""

from __future__ import annotations

import asyncio
import json

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, make_app, serving
from tests.support.fake_engine import EOS, FakeClient, spell


def request(path: str, *headers: str, version: str = "1.0", method: str = "", **body: object) -> bytes:
    data = json.dumps(body).encode() if body else b""
    lines = [f"{method or ('POST' if body else 'GET')} {path} HTTP/{version}", "Host: x", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def answers(port: int, *requests: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """All answers on one connection, each sent after the one before was read; the last one is read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = []
    async with asyncio.timeout(10):
        for number, sent in enumerate(requests):
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
            last = number == len(requests) - 1
            body = await (reader.read() if last else reader.readexactly(int(headers["content-length"])))
            got.append((int(head[0].split()[1]), headers, body))
    writer.close()
    return got


@pytest.fixture
def app(tokenizer: Tokenizer) -> object:
    return make_app(tokenizer, FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS, pause=0.01))


@pytest.mark.parametrize("keep", [[], ["Connection: keep-alive"], ["Connection: close"]])
@pytest.mark.parametrize(
    ("path", "last"),
    [("/v1/chat/completions", "data: [DONE]"), ("/v1/messages", "event: message_stop"), ("/v1/responses", "")],
)
async def test_a_stream_ends_with_the_connection(app: object, path: str, last: str, keep: list[str]) -> None:
    body = {"model": "tiny", "stream": True, "max_tokens": 16} | (
        {"input": "Hi"} if path == "/v1/responses" else {"messages": HI}
    )
    async with serving(app) as port:
        [(status, headers, got)] = await answers(port, request(path, *keep, **body))
    assert status == 200
    assert "transfer-encoding" not in headers
    assert "content-length" not in headers
    assert headers["connection"] == "close"
    blocks = got.decode().split("\n\n")
    assert all(block.startswith(("data: ", "event: ")) for block in blocks[:-1])
    assert blocks[-1] == ""
    assert last in got.decode()


async def test_a_whole_answer_ends_with_the_connection(app: object) -> None:
    async with serving(app) as port:
        for sent in (request("/v1/models"), request("/v1/chat/completions", messages=HI), request("/nowhere")):
            [(_, headers, got)] = await answers(port, sent)
            assert json.loads(got)
            assert int(headers["content-length"]) == len(got)
            assert headers["connection"] == "close"


async def test_a_connection_stays_for_those_who_ask(app: object) -> None:
    keep = "Connection: keep-alive"
    async with serving(app) as port:
        got = await answers(
            port,
            request("/v1/models", keep),
            request("/v1/chat/completions", keep, messages=HI),
            request("/nowhere", keep),
            request("/v1/chat/completions", keep, messages=HI, stream=True),
        )
    assert [status for status, _, _ in got] == [200, 200, 404, 200]
    assert [headers["connection"] for _, headers, _ in got] == ["keep-alive"] * 3 + ["close"]
    assert got[-1][2].endswith(b"data: [DONE]\n\n")


async def test_head_keeps_to_it(app: object) -> None:
    async with serving(app) as port:
        [(status, headers, got)] = await answers(port, request("/v1/models", method="HEAD"))
    assert (status, got) == (200, b"")
    assert int(headers["content-length"]) > 0


async def test_newer_clients_still_get_chunks(app: object) -> None:
    async with serving(app) as port:
        sent = request("/v1/chat/completions", "Connection: close", version="1.1", messages=HI, stream=True)
        [(_, headers, got)] = await answers(port, sent)
    assert headers["transfer-encoding"] == "chunked"
    assert got.endswith(b"0\r\n\r\n")
