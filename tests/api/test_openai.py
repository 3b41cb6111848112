"""The HTTP API over a fake engine: answers, streams, errors, and what reaches the engine."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from pydantic import ValidationError

from miniserve.api import middleware
from miniserve.api.app import create_app
from miniserve.api.fields import Body
from miniserve.api.generation import Generation
from miniserve.api.openai.answers import Head
from miniserve.api.openai.chat import ChatShape
from miniserve.api.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest
from miniserve.api.sound import MAX_DEPTH
from miniserve.api.streaming import events as streamed
from miniserve.config import EngineConfig, ServeConfig
from miniserve.dispatcher import EngineError
from miniserve.hub import resolve as hub
from miniserve.monitor.metrics import Metrics
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.scheduler import QueueFull
from miniserve.text.tokenizer import Tokenizer
from tests.support.fake_engine import EOS, FakeClient, spell

HI = [{"role": "user", "content": "Hi"}]
PROMPT = list(b"user: Hi\nassistant:")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


def make_app(tokenizer: Tokenizer, engine: FakeClient, defaults: dict[str, Any] | None = None, **config: Any) -> Any:
    names = config.pop("served_model_names", ["tiny", "alias"])
    settings = ServeConfig(engine=EngineConfig(model="tiny"), served_model_names=names, **config)
    return create_app(settings, engine, engine.feed, tokenizer, defaults or {})


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


@pytest.fixture
def api(tokenizer: Tokenizer) -> Api:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS, cached=16)
    return Api(make_app(tokenizer, engine), engine)


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


# --- chat -----------------------------------------------------------------------------------------------------------


async def test_chat(api: Api) -> None:
    response = await api.http.post(
        "/v1/chat/completions", json={"messages": HI, "model": "alias"}, headers={"X-Request-Id": "abc"}
    )
    assert response.headers["x-request-id"] == "abc"
    answer = response.json()
    assert answer.pop("created") > 0
    assert answer == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "alias",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 6,
            "total_tokens": len(PROMPT) + 6,
            "prompt_tokens_details": {"cached_tokens": 16},
        },
    }
    (turn,) = api.engine.turns
    assert turn.tokens == PROMPT
    assert turn.params.max_tokens == 512 - len(PROMPT)
    assert not turn.cancelled.is_set()


async def test_stream_is_exact(api: Api) -> None:
    chunks = events(await api.chat(stream=True, stream_options={"include_usage": True}))
    assert len({(c["id"], c["object"], c["created"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *choices, last = [c["choices"] for c in chunks]
    assert last == []
    assert choices[0] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(c[0]["delta"].keys() == {"content"} and c[0]["finish_reason"] is None for c in choices[1:-1])
    assert choices[-1] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert deltas(chunks) == "Hello"
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["total_tokens"] == len(PROMPT) + 6
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_stream_without_usage(api: Api) -> None:
    chunks = events(await api.chat(stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_stream_with_continuous_usage(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("abc"), "pause": 0.01, "cached": 16}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(await api.chat(stream=True, n=2, stream_options=options))
    for index in range(2):
        usages = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
        assert [u["completion_tokens"] for u in usages] == [0, 1, 2, 3, 3]
        assert {u["prompt_tokens"] for u in usages} == {len(PROMPT)}
        assert usages[-1]["total_tokens"] == len(PROMPT) + 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    chunks = events(await api.complete(stream=True, max_tokens=2, echo=True, stream_options=options))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [0, 1, 2, 2, 2]
    for ignored in ({"continuous_usage_stats": True}, {"include_usage": False, "continuous_usage_stats": True}):
        chunks = events(await api.chat(stream=True, stream_options=ignored))
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("One. END. Two"), "pause": 0.001}
    response = await api.chat(
        stop=["never", "END"], stream=stream, stream_options={"include_usage": True} if stream else None
    )
    if stream:
        chunks = events(response)
        assert deltas(chunks) == "One. "
        choice, usage = chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
        assert choice["message"]["content"] == "One. "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    assert usage["completion_tokens"] == 8
    assert api.engine.turns[0].cancelled.is_set()


async def test_stop_string_within_one_output(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": [list(b"One. END. Two")]}
    answer = (await api.chat(stop="END", include_stop_str_in_output=True, logprobs=True)).json()
    assert answer["choices"][0]["message"]["content"] == "One. END"
    assert answer["usage"]["completion_tokens"] == 8 == len(answer["choices"][0]["logprobs"]["content"])


async def test_stop_tokens_are_hidden_unless_asked_for(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("Hi!"), "stop_token": ord("!")}
    choice = (await api.chat(stop_token_ids=[33])).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hi", 33)
    choice = (await api.chat(stop_token_ids=[33], include_stop_str_in_output=True)).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hi!", 33)


async def test_characters_are_never_split(api: Api) -> None:
    text = "naïve 😀 日本"
    api.engine.play = lambda tokens, params: {"steps": spell(text), "pause": 0.001}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == text
    assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)
    api.engine.play = lambda tokens, params: {"steps": spell("é")[:1], "finish": "length"}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == "\ufffd"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_waiting_tokens_share_a_chunk(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("x" * 300)}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == "x" * 300
    assert len(chunks) < 20


# --- choices --------------------------------------------------------------------------------------------------------


async def test_choices_follow_the_first_token(api: Api) -> None:
    waiting = []

    def play(tokens: list[int], params: Any) -> dict[str, Any]:
        waiting.append([turn.given for turn in api.engine.turns])
        return {"steps": spell("abc"[len(waiting) - 1] * 3), "pause": 0.005, "cached": 16 * (len(waiting) > 1)}

    api.engine.play = play
    chunks = events(await api.chat(stream=True, n=3, seed=2**63 - 1, stream_options={"include_usage": True}))
    assert waiting[0] == []
    assert waiting[1][0] > 0
    assert [turn.params.seed for turn in api.engine.turns] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [c["choices"][0]["index"] for c in chunks[:3]] == [0, 1, 2]
    assert [deltas(chunks, i) for i in range(3)] == ["aaa", "bbb", "ccc"]
    order = [c["choices"][0]["index"] for c in chunks[3:-1]]
    assert order != sorted(order), "the choices' streams are interleaved"
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert chunks[-1]["usage"]["prompt_tokens"] == len(PROMPT)
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_choices_without_a_stream(api: Api) -> None:
    answer = (await api.chat(n=3)).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {"Hello"}
    assert [turn.params.seed for turn in api.engine.turns] == [None] * 3


async def test_choices_that_end_with_their_first_output(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": [[]], "finish": "length"}
    answer = (await api.chat(n=2)).json()
    assert [c["message"]["content"] for c in answer["choices"]] == ["", ""]


async def test_a_refused_choice_ends_the_others(api: Api) -> None:
    def play(tokens: list[int], params: Any) -> dict[str, Any]:
        if api.engine.turns:
            raise QueueFull("Full.", 3)
        return {"steps": spell("abc"), "pause": 0.01}

    api.engine.play = play
    response = await api.chat(n=2)
    assert error_of(response, 503)["code"] == "queue_full"
    assert api.engine.turns[0].cancelled.is_set()


# --- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("hé"), "pause": 0.001, "finish": "length"}
    response = await api.chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [c["choices"][0]["logprobs"] for c in events(response)]
        content = [entry for logprobs in found if logprobs for entry in logprobs["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0x68], [0xC3], [0xA9]]
    assert content[0]["top_logprobs"] == [
        {"token": "h", "bytes": [0x68], "logprob": -0.5},
        {"token": "i", "bytes": [0x69], "logprob": -1.5},
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("héy"), "pause": 0.001, "finish": "length"}
    response = await api.complete(logprobs=1, stream=stream)
    parts = events(response) if stream else [response.json()]
    found = [part["choices"][0]["logprobs"] for part in parts]
    joined = {key: [value for logprobs in found for value in logprobs[key]] for key in found[0]}
    assert joined == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "y"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"h": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"y": -0.5}],
        "text_offset": [0, 1, 1, 2],
    }
    assert api.engine.turns[0].params.logprobs == 1


async def test_no_logprobs_unless_asked(api: Api) -> None:
    assert (await api.chat(logprobs=False)).json()["choices"][0]["logprobs"] is None
    assert api.engine.turns[0].params.logprobs is None
    await api.chat(logprobs=True)
    assert api.engine.turns[1].params.logprobs == 0


# --- completions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [b"Hi"]),
        (["a", "b"], [b"a", b"b"]),
        ([72, 105], [b"Hi"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        (["a", [98]], [b"a", b"b"]),
    ],
)
async def test_prompts(api: Api, prompt: Any, expected: list[bytes]) -> None:
    answer = (await api.complete(prompt=prompt, n=2, echo=True, max_tokens=4)).json()
    firsts = api.engine.turns[: len(expected)]
    assert [bytes(turn.tokens) for turn in firsts] == expected
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    texts = [prompt.decode() + "Hell" for prompt in expected for _ in range(2)]
    assert [c["text"] for c in answer["choices"]] == texts
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 8 * len(expected)


async def test_completion_stream(api: Api) -> None:
    chunks = events(await api.complete(stream=True, echo=True))
    assert [c["object"] for c in chunks] == ["text_completion"] * len(chunks)
    assert chunks[0]["choices"] == [
        {"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert deltas(chunks) == "HiHello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert api.engine.turns[0].params.max_tokens == 16


# --- what reaches the engine ----------------------------------------------------------------------------------------


async def test_parameters(tokenizer: Tokenizer) -> None:
    engine = FakeClient(steps=[[65]])
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2, "max_new_tokens": 99}
    api = Api(make_app(tokenizer, engine, defaults), engine)
    assert (await api.chat(temperature=0, some_unknown_field={"x": 1})).status_code == 200
    params = engine.turns[0].params
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0, 20, 1.0, 99)
    extras = {
        "n": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "min_tokens": 1,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    body = extras | {"logit_bias": {"65": -100}, "max_completion_tokens": 3, "max_tokens": 9, "cache_salt": "s"}
    assert (await api.chat(**body)).status_code == 200
    turn = engine.turns[1]
    assert {name: getattr(turn.params, name) for name in extras} == extras
    assert turn.params.logit_bias == {65: -100.0}
    assert turn.params.max_tokens == 3
    assert turn.salt == "s"


async def test_ignored_parameters_are_told(api: Api) -> None:
    for post in (api.chat, api.complete):
        for stream in (False, True):
            response = await post(stream=stream, user="me", verbosity="low", metadata={}, temprature=1)
            assert response.headers["x-ignored-parameters"] == "temprature, user, verbosity"
    assert "guided_json" in error_of(await api.chat(guided_json={"type": "object"}), 400)["message"]


async def test_conversation_ids(api: Api) -> None:
    for headers, body, expected in [
        ({"X-Conversation-ID": "c", "X-Session-ID": "s"}, {}, "c"),
        ({"X-Session-ID": "s"}, {"prompt_cache_key": "k"}, "s"),
        ({"x-session-token": "t"}, {}, "t"),
        ({}, {"prompt_cache_key": "k"}, "k"),
        ({}, {}, ""),
    ]:
        await api.http.post("/v1/chat/completions", json={"messages": HI, **body}, headers=headers)
        assert api.engine.turns[-1].conversation == expected
    response = await api.http.post("/v1/chat/completions", json={"messages": HI}, headers={"X-Session-ID": "x" * 999})
    assert error_of(response, 400)["param"] == "X-Session-ID"


async def test_messages(api: Api) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "So"},
    ]
    await api.chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert bytes(api.engine.turns[0].tokens).decode() == (
        "system: Be kind.\nuser: a\nb\nassistant: \ntool: 42\nassistant: So"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert (await api.chat(tools=tools, tool_choice="none", response_format={"type": "text"})).status_code == 200


# --- errors ---------------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://x"}}]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a list of text parts"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs `content`"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0]", "text only"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"model": "\ud800"}, "model", "surrogate"),
        ({"stop": "\udc00"}, "stop[0]", "surrogate"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "`messages`"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": "x"}, "n", "valid integer"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"seed": 10**400}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens", "at most"),
        ({"min_tokens": 600}, "min_tokens", "at most"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop[0]", "at least 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "integer"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "49151"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"stop_token_ids": [49152]}, "stop_token_ids", "49151"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs `json_schema`"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "must look like"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "needs `tools`"),
        ({"cache_salt": ""}, "cache_salt", "at least 1"),
        ({"prompt_cache_key": "x" * 257}, "prompt_cache_key", "at most 256"),
    ],
)
async def test_bad_chat_requests(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    content = json.dumps({"messages": HI, **body})
    response = await api.http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert not api.engine.turns


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128"),
        ({"prompt": [1, "x"]}, "prompt[0][1]", "integer"),
        ({"prompt": [-1]}, "prompt[0][0]", "greater"),
        ({"prompt": [49152]}, "prompt", "49151"),
        ({"prompt": {"a": 1}}, "prompt", "list"),
        ({"prompt": [{"a": 1}]}, "prompt[0]", "string or a list of token ids"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"echo": True, "logprobs": 1}, "echo", "logprobs"),
        ({"logprobs": 21}, "logprobs", "20"),
    ],
)
async def test_bad_completion_requests(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(await api.complete(**body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not api.engine.turns


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [1] * 9}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 9}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * 9}]}),
        (ChatRequest, {"messages": HI, "tools": [1] * 9}),
        (ChatRequest, {"messages": HI, "stop": [1] * 9}),
        (ChatRequest, {"messages": HI, "stop_token_ids": ["a"] * 9}),
        (ChatRequest, {"messages": HI, "logit_bias": {f"a{i}": 1 for i in range(9999)}}),
        (CompletionRequest, {"prompt": [{}] * 9}),
        (CompletionRequest, {"prompt": [["a"] * 9]}),
        (CompletionRequest, {"prompt": [1, *["a"] * 9]}),
        (DetokenizeRequest, {"tokens": ["a"] * 9}),
    ],
)
def test_many_mistakes_are_one_error(kind: type[Body], body: dict[str, Any]) -> None:
    """An error object for each of a million wrong items would take seconds and a gigabyte."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() == 1


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
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8 from byte 43 on"),
        (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "more than 4300 digits"),
        (gzip.compress(json.dumps({"messages": HI}).encode()), "gzip"),
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


async def test_context_length(api: Api) -> None:
    error = error_of(await api.chat(max_tokens=500), 400)
    assert error["code"] == "context_length_exceeded"
    for words in ("maximum context length is 512", "519", "19 in `messages`", "500 to generate", "at most 493"):
        assert words in error["message"]
    error = error_of(await api.complete(prompt="x" * 512), 400)
    assert error["code"] == "context_length_exceeded"
    assert (await api.complete(prompt="x" * 500, max_tokens=None)).json()["usage"]["completion_tokens"] == 6
    assert (await api.complete(prompt="x" * 511)).json()["usage"]["completion_tokens"] == 1
    assert (await api.chat(max_tokens=493)).status_code == 200


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
    api.engine.healthy, api.engine.unhealthy_reason = False, "d0 is gone."
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


async def test_unexpected_errors_tell_nothing(api: Api) -> None:
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


# --- the other routes -----------------------------------------------------------------------------------------------


async def test_small_routes(api: Api) -> None:
    models = (await api.http.get("/v1/models")).json()
    assert [(m["id"], m["max_model_len"], m["root"]) for m in models["data"]] == [
        ("tiny", 512, "tiny"),
        ("alias", 512, "tiny"),
    ]
    assert (await api.http.get("/version")).json().keys() == {"version"}
    assert (await api.http.get("/health")).status_code == 200
    tokens = (await api.http.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})).json()
    assert tokens == {"count": 2, "max_model_len": 512, "tokens": [72, 105], "token_strs": ["H", "i"]}
    tokens = (await api.http.post("/tokenize", json={"messages": HI, "model": "tiny"})).json()
    assert (tokens["tokens"], tokens["token_strs"]) == (PROMPT, None)
    text = await api.http.post("/detokenize", json={"tokens": [72, 105, EOS]})
    assert text.json() == {"prompt": "Hi<|eos_token|>"}
    for body in ({}, {"prompt": "x", "messages": HI}):
        assert error_of(await api.http.post("/tokenize", json=body), 400)["param"] == "prompt"
    error_of(await api.http.post("/detokenize", json={"tokens": [49152]}), 400)
    error_of(await api.http.post("/detokenize", json={"tokens": [1], "model": "x"}), 404)


async def test_one_model(tokenizer: Tokenizer) -> None:
    engine = FakeClient()
    api = Api(make_app(tokenizer, engine, served_model_names=["org/tiny", "alias"]), engine)
    models = (await api.http.get("/v1/models")).json()["data"]
    for path, model in (("org/tiny", models[0]), ("org%2Ftiny", models[0]), ("alias", models[1])):
        assert (await api.http.get(f"/v1/models/{path}")).json() == model
    for path in ("tiny", "org", "org/tiny/"):
        error = error_of(await api.http.get(f"/v1/models/{path}"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_metrics(api: Api) -> None:
    await api.chat()
    await api.chat(max_tokens=2)
    response = await api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    expected = {
        f"vllm:num_requests_running{{{label}}}": 1,
        f"vllm:num_requests_waiting{{{label}}}": 1,
        f"vllm:kv_cache_usage_perc{{{label}}}": 0.25,
        f"vllm:time_to_first_token_seconds_count{{{label}}}": 2,
        f"vllm:inter_token_latency_seconds_count{{{label}}}": 6,
        f"vllm:e2e_request_latency_seconds_count{{{label}}}": 2,
        f"vllm:prompt_tokens_total{{{label}}}": 2 * len(PROMPT),
        f"vllm:generation_tokens_total{{{label}}}": 8,
        f'vllm:request_success_total{{finished_reason="stop",{label}}}': 1,
        f'vllm:request_success_total{{finished_reason="length",{label}}}': 1,
        f'vllm:request_success_total{{finished_reason="abort",{label}}}': 0,
        f'vllm:prefix_cache_queries_total{{engine="d0",{label}}}': 640,
        f'vllm:prefix_cache_hits_total{{engine="d0",{label}}}': 320,
        f'vllm:num_preemptions_total{{engine="d0",{label}}}': 3,
        'miniserve:handoffs_total{destination="d0",source="p0"}': 4,
        'miniserve:handoff_pages_total{destination="d0",source="p0"}': 16,
        'miniserve:handoff_bytes_total{destination="d0",source="p0"}': 16 * 4096,
        'miniserve:handoff_seconds_total{destination="d0",source="p0"}': 2.5,
        'miniserve:placements_total{home="d0",policy="conserve",prefill_worker="p0"}': 4,
        'miniserve:kv_pages{state="free",worker="d0"}': 60,
    }
    assert {name: float(samples[name]) for name in expected} == expected


# --- token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [False, True])
async def test_completions_tell_their_tokens(api: Api, echo: bool) -> None:
    """As vLLM does: all of them, the one that ended it too; the prompt's ids take the place of its echo."""
    answer = (await api.complete(return_token_ids=True, echo=echo, n=2)).json()
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == list(b"Hi")
        assert choice["token_ids"] == [*b"Hello", EOS]
        assert choice["text"] == "Hello"
    assert not (await api.complete()).json()["choices"][0].keys() & {"prompt_token_ids", "token_ids"}


@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_has_a_chunk_for_every_token(api: Api, echo: bool) -> None:
    """Those that are no whole character, or perhaps the beginning of a stop string, have no text yet."""
    steps = [[195], [169], *spell("ab"), [EOS]]
    api.engine.play = lambda tokens, params: {"steps": steps, "stop_token": EOS, "pause": 0.005}
    response = await api.complete(stream=True, return_token_ids=True, echo=echo, n=2, stop=["bc"])
    chunks = [chunk["choices"][0] for chunk in events(response)]
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert [c["prompt_token_ids"] for c in own] == [list(b"Hi")] + [None] * (len(own) - 1)
        told = [(c["token_ids"], c["text"]) for c in own[echo:]]
        assert told == [([195], ""), ([169], "é"), ([97], "a"), ([98], ""), ([EOS], "b"), ([], "")]
        assert [c["finish_reason"] for c in own[echo:]] == [None] * 5 + ["stop"]
    plain = events(await api.complete(stream=True, stop=["bc"]))
    assert [c["choices"][0]["text"] for c in plain] == ["é", "a", "b", ""]
    assert not any(c["choices"][0].keys() & {"prompt_token_ids", "token_ids"} for c in plain)


@pytest.mark.parametrize("wanted", [True, False])
async def test_chats_tell_their_tokens(tokenizer: Tokenizer, wanted: bool) -> None:
    """The prompt's ids are beside the choices there: once, and in the chunk that says who speaks."""

    def begin() -> Generation:
        engine = FakeClient(steps=[[195], [169], [EOS]], stop_token=EOS, pause=0.005)
        prompts = [([1, 2, 3], SamplingParams(max_tokens=9))]
        metrics = Metrics(engine, "tiny")  # type: ignore[arg-type]
        generation = Generation(prompts, lambda p, params, _: engine.submit(p, params), tokenizer, metrics, 0.0)  # type: ignore[arg-type, return-value]
        generation.start()
        return generation

    head: Head = {"id": "x", "object": "chat.completion", "created": 1, "model": "tiny"}
    async with begin() as generation:
        await generation.finish()
        whole = ChatShape(tokenizer, wanted).whole(head, generation)
    async with begin() as generation:
        data = b"".join(
            [piece async for piece in streamed(generation, ChatShape(tokenizer, wanted), head, False, False)]
        )
    chunks = [json.loads(line[6:]) for line in data.decode().split("\n\n")[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks]
    if wanted:
        assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == [1, 2, 3]
        assert whole["choices"][0]["token_ids"] == [195, 169, EOS]
        assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
        assert "token_ids" not in choices[0]
        told = [(c["token_ids"], c["delta"]) for c in choices[1:]]
        assert told == [([195], {"content": ""}), ([169], {"content": "é"}), ([EOS], {"content": ""}), ([], {})]
    else:
        assert [c["delta"] for c in choices[1:]] == [{"content": "é"}, {}]
        assert "token_ids" not in data.decode()
        assert "token_ids" not in json.dumps(whole)


# --- over a socket --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """A real server on a free port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await task


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
                await ai.chat.completions.create(model="tiny", messages=HI, max_tokens=5000)
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
