"""Every parameter is supported, ignored with a warning, or refused, and docs/api.md says which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import ValidationError

from miniserve.frontend.message_schemas import MessagesRequest
from miniserve.frontend.parameters import ignored_header
from miniserve.frontend.response_schemas import ResponsesRequest
from miniserve.frontend.schemas import ChatRequest, CompletionRequest, RequestBody

HI = [{"role": "user", "content": "Hi"}]
PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text("utf-8")
APIS: list[tuple[str, type[RequestBody], type, dict[str, Any]]] = [
    ("/v1/chat/completions", ChatRequest, ChatParams, {"messages": HI}),
    ("/v1/completions", CompletionRequest, CompletionCreateParamsBase, {"prompt": "Hi"}),
    ("/v1/responses", ResponsesRequest, ResponseCreateParamsBase, {"input": "Hi"}),
    ("/v1/messages", MessagesRequest, MessageCreateParamsBase, {"messages": HI, "max_tokens": 9}),
]


def rows(route: str) -> dict[str, tuple[str, str]]:
    """By parameter: its status, and what is said about it."""
    section = re.split(r"^## ", PAGE.split(f"## POST {route}\n")[1], flags=re.MULTILINE)[0]
    found = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (.*?) ?\|$", section, flags=re.MULTILINE)
    assert len(found) == len({name for name, *_ in found})
    return {name: (status, note) for name, status, note in found}


@pytest.mark.parametrize(("route", "kind", "official", "least"), APIS)
def test_the_page_says_what_the_code_does(
    route: str, kind: type[RequestBody], official: type, least: dict[str, Any]
) -> None:
    told = rows(route)
    official_names = set(official.__annotations__) | {"stream"}
    assert official_names | kind.model_fields.keys() | kind.refused.keys() <= told.keys()
    assert not kind.model_fields.keys() & kind.refused.keys()
    for name, (status, note) in told.items():
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


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": HI, "modalities": ["text"], "functions": [], "echo": False}),
        (CompletionRequest, {"prompt": "Hi", "best_of": 1, "suffix": ""}),
    ],
)
def test_what_asks_for_nothing_passes(kind: type[RequestBody], body: dict[str, Any]) -> None:
    assert kind.model_validate(body).ignored == []


def test_names_in_the_header() -> None:
    assert ignored_header([]) == {}
    assert ignored_header(["b", "a", "a"]) == {"X-Ignored-Parameters": "a, b"}
    assert ignored_header(["x\r\nSet-Cookie: a=b", "\ud800", "y" * 100]) == {"X-Ignored-Parameters": "..."}
    many = ignored_header([f"p{i:05}" for i in range(50_000)])["X-Ignored-Parameters"]
    assert many.startswith("p00000, p00001, ")
    assert many.endswith("p00015, ...")
