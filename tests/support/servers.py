"""The API of models that call tools and reason, over a fake engine that says what a test wants it to say."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai

from miniserve.text.formats import FORMATS
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, reset, shared_app
from tests.support.fake_engine import FakeClient, FakeTurn


class Server:
    """The API of a model with a format's template, and the engine behind it. `say` is what the model will say."""

    engine_type: type[FakeClient] = FakeClient

    def __init__(self, tokenizer: Tokenizer, base: str = "", **config: Any) -> None:
        self.tokenizer = tokenizer
        self.app, self.engine = shared_app(tokenizer, self.engine_type, **config)
        reset(self.engine)
        self.engine.max_model_len, self.engine.vocab_size = 4096, tokenizer.vocab_size
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url=f"http://test{base}")
        self.say("Hello")

    def say(self, text: str, **play: Any) -> None:
        end = {"stop_token": 319} if play.get("finish", "stop") == "stop" else {}
        steps = [[token] for token in self.tokenizer.encode(text)] + ([[319]] if end else [])
        self.engine.play = lambda prompt, params: {"steps": steps, "cached": 3, **end, **play}

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.turns[-1].tokens, skip_special_tokens=False)


class ChatServer(Server):
    """Its clients ask for chats."""

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json={"messages": HI, **body})

    async def answers(self, **body: Any) -> list[dict[str, Any]]:
        """The first choice whole, and put together from a stream; without the ids of calls."""
        whole = await self.post(**body)
        assert whole.status_code == 200, whole.text
        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = await self.post(stream=True, stream_options=options, **body)
        chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n")[:-2]]
        one = {**whole.json()["choices"][0], "usage": whole.json()["usage"]}
        two: dict[str, Any] = {"message": {"role": "assistant", "content": None, "refusal": None}}
        calls: list[dict[str, Any]] = []
        for chunk in chunks:
            for choice in chunk["choices"]:
                delta = choice["delta"]
                for key in delta.keys() & {"content", "reasoning", "reasoning_content"}:
                    two["message"][key] = (two["message"].get(key) or "") + delta[key]
                for call in delta.get("tool_calls", []):
                    if (index := call.pop("index")) == len(calls) - 1:
                        calls[index]["function"]["arguments"] += call["function"]["arguments"]
                        continue
                    assert index == len(calls)
                    calls.append(call)
                two |= {key: choice[key] for key in ("finish_reason", "stop_reason", "index") if key in choice}
                if choice["logprobs"]:
                    two.setdefault("logprobs", {"content": []})["content"] += choice["logprobs"]["content"]
                if "token_ids" in choice:
                    two["token_ids"] = two.get("token_ids", []) + choice["token_ids"]
        if calls:
            two["message"]["tool_calls"] = calls
        if not two["message"]["content"] and (calls or "reasoning" in two["message"]):
            two["message"]["content"] = None
        two.setdefault("logprobs", None)
        two["usage"] = chunks[-1]["usage"]
        for found in (one, two):
            for call in found["message"].get("tool_calls", []):
                assert call.pop("id").startswith("call_")
        return [one, two]


# --- responses ------------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = FORMATS["hermes"].write([("weather", {"city": "Paris"})])
THOUGHT = "<think>\nHm.\n</think>\n\n"


class NumberingEngine(FakeClient):
    """Numbers conversations as a scheduler would, and notes which one each turn asked for."""

    asked: list[str | int]

    def submit(self, *args: Any, **options: Any) -> FakeTurn:
        turn = super().submit(*args, **options)
        self.asked.append(turn.conversation)
        turn.conversation = turn.conversation or len(self.turns)
        return turn


class ResponsesServer(Server):
    """Its clients ask for responses."""

    engine_type = NumberingEngine

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, "/v1")
        self.engine.asked = []
        self.openai = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=self.http, max_retries=0)

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/responses", json={"input": "Hi", **body})

    async def whole(self, **body: Any) -> dict[str, Any]:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, **body: Any) -> list[dict[str, Any]]:
        response = await self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, rest = response.text.split("\n\n")
        assert rest == ""
        events = []
        for number, lines in enumerate(pieces):
            name, data = lines.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert (name, number) == (f"event: {event['type']}", event["sequence_number"])
            events.append(event)
        return events


def bare(value: Any) -> Any:
    """Without ids and times."""
    if isinstance(value, list):
        return [bare(item) for item in value]
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key not in ("id", "call_id") and key[-3:] != "_at"}
    return value
