"""Every parameter is supported, ignored with a warning, or refused, and docs/api.md says which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from anthropic import types as anthropic
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types import chat, responses
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.responses.response_input_param import FunctionCallOutput
from pydantic import ValidationError

from miniserve.api.fields import RequestBody, ignored_header
from miniserve.api.messages.schemas import MessagesRequest
from miniserve.api.openai.schemas import ChatRequest, CompletionRequest
from miniserve.api.responses.schemas import ResponsesRequest

HI = [{"role": "user", "content": "Hi"}]
PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
APIS: list[tuple[str, type[RequestBody], type, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, ChatParams, {"messages": HI}),
    ("/v1/completions", CompletionRequest, CompletionCreateParamsBase, {"prompt": "Hi"}),
    ("/v1/responses", ResponsesRequest, ResponseCreateParamsBase, {"input": "Hi"}),
    ("/v1/messages", MessagesRequest, MessageCreateParamsBase, {"messages": HI, "max_tokens": 9}),
]


def rows(route: str) -> dict[str, tuple[str, str]]:
    """By parameter: its status, and what is said about it."""
    sections = [PAGE.split(f"## {title}\n")[1] for title in ("All routes that generate", f"POST {route}")]
    section = "".join(re.split(r"^## ", section, flags=re.MULTILINE)[0] for section in sections)
    found = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (.*?) ?\|$", section, flags=re.MULTILINE)
    assert len(found) == len({name for name, *_ in found})
    return {name: (status, note) for name, status, note in found}


@pytest.mark.parametrize(("route", "kind", "official", "least"), APIS)
def test_the_page_says_what_the_code_does(
    route: str, kind: type[RequestBody], official: type, least: dict[str, Any]
) -> None:
    documented = rows(route)
    official_names = set(official.__annotations__) | {"stream"}
    assert official_names | kind.model_fields.keys() | kind.refused.keys() <= documented.keys()
    assert not kind.model_fields.keys() & kind.refused.keys()
    for name, (status, note) in documented.items():
        if "." in name:
            assert status == "ignored"
        elif name in kind.model_fields:
            assert status in ("yes", "partly")
        elif name in kind.refused:
            assert status == "refused"
            assert note.startswith(kind.refused[name])
            with pytest.raises(ValidationError, match=f"`{name}` is not supported"):
                kind.model_validate({**least, name: {"any": "thing"}})
            assert kind.model_validate({**least, name: None}).ignored == []
        else:
            assert status == "ignored"
            assert kind.model_validate({**least, name: {"any": "thing"}}).ignored == [name]


TEXT = {"type": "text", "text": "Hi"}
INSIDE: list[tuple[type[RequestBody], str, type, Any]] = [
    (ChatRequest, "messages[]", chat.ChatCompletionUserMessageParam, HI[0]),
    (ChatRequest, "messages[]", chat.ChatCompletionSystemMessageParam, {"role": "system", "content": "Hi"}),
    (ChatRequest, "messages[]", chat.ChatCompletionAssistantMessageParam, {"role": "assistant", "content": "Hi"}),
    (ChatRequest, "messages[]", chat.ChatCompletionToolMessageParam,
     {"role": "tool", "content": "x", "tool_call_id": "a"}),
    (ChatRequest, "messages[].content[]", chat.ChatCompletionContentPartTextParam, TEXT),
    (ChatRequest, "stream_options", chat.ChatCompletionStreamOptionsParam, {"include_usage": True}),
    (ResponsesRequest, "input[]", responses.EasyInputMessageParam, HI[0]),
    (ResponsesRequest, "input[]", responses.ResponseOutputMessageParam, {"role": "assistant", "content": "Hi"}),
    (ResponsesRequest, "input[]", responses.ResponseFunctionToolCallParam,
     {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
    (ResponsesRequest, "input[]", FunctionCallOutput, {"type": "function_call_output", "call_id": "c", "output": "x"}),
    (ResponsesRequest, "input[]", responses.ResponseReasoningItemParam, {"type": "reasoning", "summary": []}),
    (ResponsesRequest, "input[].content[]", responses.ResponseOutputTextParam, {**TEXT, "type": "output_text"}),
    (MessagesRequest, "messages[]", anthropic.user_message_param.UserMessageParam, HI[0]),
    (MessagesRequest, "messages[].content[]", anthropic.TextBlockParam, TEXT),
    (MessagesRequest, "messages[].content[]", anthropic.ThinkingBlockParam, {"type": "thinking", "thinking": "Hm"}),
    (MessagesRequest, "messages[].content[]", anthropic.ToolUseBlockParam,
     {"type": "tool_use", "id": "a", "name": "f", "input": {}}),
    (MessagesRequest, "messages[].content[]", anthropic.ToolResultBlockParam,
     {"type": "tool_result", "tool_use_id": "a"}),
    (MessagesRequest, "output_config", anthropic.OutputConfigParam, {}),
]  # fmt: skip
"""Objects inside of requests: where they stand, the type of the official client, and the least of them."""


@pytest.mark.parametrize(("kind", "at", "official", "least"), INSIDE)
def test_keys_inside_are_accounted_for(kind: type[RequestBody], at: str, official: type, least: dict[str, Any]) -> None:
    """Each has a field, or is ignored by name, or refused; those that say nothing pass in silence."""
    _, _, _, request = next(api for api in APIS if api[1] is kind)

    def body(extra: dict[str, Any]) -> dict[str, Any]:
        value: Any = {**least, **extra}
        for part in reversed(at.split(".")):
            name = part.removesuffix("[]")
            value = {name: [value] if part.endswith("[]") else value}
            if name == "content":
                value["role"] = "user"
        return {**request, **({"stream": True} if at == "stream_options" else {}), **value}

    made: Any = kind.model_validate(body({}))
    assert made.ignored == []
    for part in at.split("."):
        made = getattr(made, part.removesuffix("[]"))
        made = made[0] if part.endswith("[]") else made
    fields = {field.alias or name for name, field in type(made).model_fields.items()}
    for key in (official.__annotations__.keys() | {"nonsense"}) - fields:
        assert kind.model_validate(body({key: {"any": "thing"}})).ignored == [f"{at}.{key}"]
        for nothing in (None, [], "", False):
            assert kind.model_validate(body({key: nothing})).ignored == []


def test_many_keys_inside() -> None:
    message = {**HI[0], **{f"k{i}": 1 for i in range(100_000)}}
    assert len(ChatRequest.model_validate({"messages": [message] * 3}).ignored) == 17


def test_what_answers_have_may_come_back() -> None:
    harmless = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "reasoning_content": "Hm"}
    said = {"role": "assistant", "content": "Hi", **harmless}
    assert ChatRequest.model_validate({"messages": [*HI, said]}).ignored == []
    ignored = ChatRequest.model_validate({"messages": [*HI, {**said, "audio": {"id": "a"}, "refusal": "No."}]}).ignored
    assert sorted(ignored) == ["messages[].audio", "messages[].refusal"]
    with pytest.raises(ValidationError, match="use `tool_calls`"):
        ChatRequest.model_validate({"messages": [{**said, "function_call": {"name": "f", "arguments": ""}}]})


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": HI, "modalities": ["text"], "functions": [], "echo": False}),
        (CompletionRequest, {"prompt": "Hi", "best_of": 1, "suffix": ""}),
    ],
)
def test_what_asks_for_nothing_passes(kind: type[RequestBody], body: dict[str, Any]) -> None:
    assert kind.model_validate(body).ignored == []


@pytest.mark.parametrize(("route", "kind", "official", "least"), APIS)
def test_null_is_as_good_as_nothing(route: str, kind: type[RequestBody], official: type, least: dict[str, Any]) -> None:
    for name in kind.model_fields.keys() - least.keys():
        made = kind.model_validate({**least, name: None})
        if name != "max_tokens":  # of a completion: null is the rest of the context
            assert getattr(made, name) == getattr(kind.model_validate(least), name)


def test_names_in_the_header() -> None:
    assert ignored_header([]) == {}
    assert ignored_header(["b", "a", "a"]) == {"X-Ignored-Parameters": "a, b"}
    assert ignored_header(["messages[].refusal"]) == {"X-Ignored-Parameters": "messages[].refusal"}
    assert ignored_header(["x\r\nSet-Cookie: a=b", "\ud800", "y" * 100]) == {"X-Ignored-Parameters": "..."}
    many = ignored_header([f"p{i:05}" for i in range(50_000)])["X-Ignored-Parameters"]
    assert many.startswith("p00000, p00001, ")
    assert many.endswith("p00015, ...")
