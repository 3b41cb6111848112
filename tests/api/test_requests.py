"""Requests for chats and completions: what reaches the engine, and what is wrong is one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from miniserve.api.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest
from miniserve.text.messages import Body
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, Api, error_of, make_app
from tests.support.fake_engine import FakeClient


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


async def test_ignored_parameters_are_named(api: Api) -> None:
    for post in (api.chat, api.complete):
        for stream in (False, True):
            response = await post(stream=stream, user="me", verbosity="low", metadata={}, temprature=1)
            assert response.headers["x-ignored-parameters"] == "temprature, user, verbosity"


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


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "x"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a list of text parts"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]", "text only"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"model": "\ud800"}, "model", "surrogate"),
        ({"stop": "\udc00"}, "stop[0]", "surrogate"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "`messages`"),
        ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": "x"}, "n", "valid integer"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"seed": 10**400}, "seed", "less than"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"structural_tag": "{}"}, "structural_tag", "use `structured_outputs`"),
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
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "must look like"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "needs `tools`"),
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
        ({"suffix": "x", "echo": True}, "suffix", "no `echo`"),
        ({"suffix": "x", "prompt": [5]}, "suffix", "not of token ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "stream"),
        ({"prompt": ["x" * 400] * 15, "prompt_logprobs": 20, "n": 2}, "prompt", "252000 log-probabilities"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
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


async def test_context_length(api: Api) -> None:
    """A limit that exceeds the room is lowered, and named; a prompt without any room is an error."""
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await api.chat(**{name: 500})
        assert answer.headers["X-Ignored-Parameters"] == name
        assert api.engine.turns[-1].params.max_tokens == 493
    assert (await api.chat(max_tokens=500, min_tokens=495)).status_code == 200
    error = error_of(await api.complete(prompt="x" * 512), 400)
    assert error["code"] == "context_length_exceeded"
    assert (await api.complete(prompt="x" * 500, max_tokens=None)).json()["usage"]["completion_tokens"] == 6
    assert (await api.complete(prompt="x" * 511)).json()["usage"]["completion_tokens"] == 1
    assert "X-Ignored-Parameters" not in (await api.chat(max_tokens=493)).headers
