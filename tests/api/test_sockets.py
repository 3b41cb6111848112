"""The API over a socket: clients that leave, bodies that do not end, connections that stay; and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from miniserve.api import middleware
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, JSON, deltas, error_of, events, make_app, serving
from tests.support.fake_engine import EOS, FakeClient, spell


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels(tokenizer: Tokenizer, stream: bool) -> None:
    engine = FakeClient(steps=[[65]] * 2000, pause=0.01)
    engine.max_model_len = 10_000
    app = make_app(tokenizer, engine)
    body = json.dumps({"messages": HI, "n": 2, "stream": stream}).encode()
    async with serving(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            await reader.readuntil(b'"content":"A"')
        while len(engine.turns) < 2:
            await asyncio.sleep(0.01)
        assert not any(turn.cancelled.is_set() for turn in engine.turns)
        writer.close()
        async with asyncio.timeout(1):
            await asyncio.gather(*(turn.cancelled.wait() for turn in engine.turns))
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in metrics
    assert all(turn.given < 1000 for turn in engine.turns)


async def test_a_body_that_does_not_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    async with serving(make_app(tokenizer, FakeClient())) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        writer.write(head.encode())
        for _ in range(2):  # each piece in time, all together not
            writer.write(b"{")
            await asyncio.sleep(0.2)
        async with asyncio.timeout(2):
            answer = (await reader.read()).decode()  # to its end: the server has closed the connection
        writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408 ")
    assert "connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_may_take_longer_than_bodies(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    engine = FakeClient(steps=spell("Hello"), pause=0.05)
    async with serving(make_app(tokenizer, engine)) as port, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        response = await http.post(url, json={"messages": HI, "stream": stream})
        assert response.status_code == 200
        assert not stream or deltas(events(response)) == "Hello"
    assert not engine.turns[0].cancelled.is_set()


async def test_clients_read_why_a_body_is_refused(tokenizer: Tokenizer) -> None:
    """Clients send all of it before they look for an answer."""
    async with (
        serving(make_app(tokenizer, FakeClient(), max_body_bytes=1000)) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0) as ai,
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await ai.completions.create(model="tiny", prompt="x" * 20_000_000)
        assert caught.value.status_code == 413

        async def chunked() -> AsyncIterator[bytes]:
            yield b" " * 2000

        async with asyncio.timeout(2), httpx.AsyncClient() as http:  # nothing is left to be waited for
            response = await http.post(f"http://127.0.0.1:{port}/tokenize", content=chunked(), headers=JSON)
        assert error_of(response, 413)["code"] == "request_too_large"


async def test_keep_alive_after_answers(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=spell("Hello"))
    async with serving(make_app(tokenizer, engine)) as port, httpx.AsyncClient() as http:
        for stream in (True, False, True):
            body = {"messages": HI, "stream": stream}
            response = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert "Hell" in response.text or deltas(events(response)) == "Hello"
    assert not any(turn.cancelled.is_set() for turn in engine.turns)


async def test_openai_client(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS, cached=16)
    async with serving(make_app(tokenizer, engine, api_key="k")) as port:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0) as ai:
            answer = await ai.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=1)
            assert answer.choices[0].message.content == "Hello"
            assert answer.usage.prompt_tokens_details.cached_tokens == 16
            assert answer.choices[0].logprobs.content[0].token == "H"
            options = {"include_usage": True}
            stream = await ai.chat.completions.create(model="tiny", messages=HI, stream=True, stream_options=options)
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
            assert chunks[-1].usage.completion_tokens == 6
            done = await ai.completions.create(model="tiny", prompt="Hi", max_tokens=4, logprobs=1)
            assert (done.choices[0].text, done.choices[0].logprobs.text_offset) == ("Hell", [0, 1, 2, 3])
            assert [model.id async for model in ai.models.list()] == ["tiny", "alias"]
            assert (await ai.models.retrieve("alias")).id == "alias"
            with pytest.raises(openai.NotFoundError):
                await ai.models.retrieve("gpt")
            with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
                await ai.completions.create(model="tiny", prompt="x" * 5000)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError):
                await ai.chat.completions.create(model="gpt", messages=HI)
            engine.play = lambda tokens, params: {"steps": [[65], [66]], "finish": "error", "error": "Out of luck."}
            stream = await ai.chat.completions.create(model="tiny", messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="Out of luck"):
                async for _ in stream:
                    pass
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as ai:
            with pytest.raises(openai.AuthenticationError):
                await ai.models.list()
