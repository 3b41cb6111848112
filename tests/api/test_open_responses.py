"""What the Open Responses specification (openresponses.org, 2026) wants of every server: each check as a test of ours.

Not among them, since they stay out on purpose: WebSocket mode and /v1/responses/compact.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.api.test_responses import ResponsesServer

TEXT, NUMBER, WHOLE, BOOLEAN = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))


def maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def needs(**properties: Any) -> dict[str, Any]:
    """An object with all of these properties, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def some(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


CONTENT = needs(type={"const": "output_text"}, text=TEXT, annotations=some({}), logprobs=some({}))
ITEM = {
    "oneOf": [
        needs(type={"const": "message"}, id=TEXT, status=TEXT, role={"const": "assistant"}, content=some(CONTENT)),
        needs(type={"const": "function_call"}, id=TEXT, call_id=TEXT, name=TEXT, arguments=TEXT, status=TEXT),
        needs(type={"const": "reasoning"}, id=TEXT, summary=some({})),
    ]
}
TOOL = needs(type={"const": "function"}, name=TEXT, description=maybe(TEXT), parameters={}, strict=maybe(BOOLEAN))
USAGE = needs(
    input_tokens=WHOLE,
    output_tokens=WHOLE,
    total_tokens=WHOLE,
    input_tokens_details=needs(cached_tokens=WHOLE),
    output_tokens_details=needs(reasoning_tokens=WHOLE),
)
RESPONSE = needs(
    id=TEXT,
    object={"const": "response"},
    created_at=WHOLE,
    completed_at=maybe(WHOLE),
    status={"enum": ["in_progress", "completed", "incomplete", "failed"]},
    incomplete_details=maybe(needs(reason=TEXT)),
    model=TEXT,
    previous_response_id=maybe(TEXT),
    instructions=maybe(TEXT),
    output=some(ITEM),
    error=maybe(needs(code=TEXT, message=TEXT)),
    tools=some(TOOL),
    tool_choice={},
    truncation={"enum": ["auto", "disabled"]},
    parallel_tool_calls=BOOLEAN,
    text=needs(format=needs(type=TEXT)),
    top_p=NUMBER,
    presence_penalty=NUMBER,
    frequency_penalty=NUMBER,
    top_logprobs=WHOLE,
    temperature=NUMBER,
    reasoning=maybe(needs(effort=maybe(TEXT), summary=maybe(TEXT))),
    user=maybe(TEXT),
    usage=maybe(USAGE),
    max_output_tokens=maybe(WHOLE),
    max_tool_calls=maybe(WHOLE),
    store=BOOLEAN,
    background=BOOLEAN,
    service_tier=TEXT,
    metadata={"type": "object"},
    safety_identifier=maybe(TEXT),
    prompt_cache_key=maybe(TEXT),
)
PLACE = {"item_id": TEXT, "output_index": WHOLE}
EVENTS: dict[str, dict[str, Any]] = {
    **{f"response.{when}": {"response": RESPONSE} for when in ("created", "in_progress", "completed", "incomplete")},
    "response.output_item.added": {"output_index": WHOLE, "item": needs(type=TEXT, id=TEXT)},
    "response.output_item.done": {"output_index": WHOLE, "item": ITEM},
    "response.content_part.added": {**PLACE, "content_index": WHOLE, "part": needs(type=TEXT)},
    "response.content_part.done": {**PLACE, "content_index": WHOLE, "part": needs(type=TEXT)},
    "response.output_text.delta": {**PLACE, "content_index": WHOLE, "delta": TEXT, "logprobs": some({})},
    "response.output_text.done": {**PLACE, "content_index": WHOLE, "text": TEXT, "logprobs": some({})},
    "response.reasoning_text.delta": {**PLACE, "content_index": WHOLE, "delta": TEXT},
    "response.reasoning_text.done": {**PLACE, "content_index": WHOLE, "text": TEXT},
    "response.function_call_arguments.delta": {**PLACE, "delta": TEXT},
    "response.function_call_arguments.done": {**PLACE, "arguments": TEXT},
}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


PLACES = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "The weather somewhere", "parameters": PLACES}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco"}}\n</tool_call>'
IMAGE = [
    {"type": "input_text", "text": "What is this?"},
    {"type": "input_image", "image_url": "data:image/png;base64,iVBO"},
]
CHECKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a text": ({"input": [said("user", "Say hello.")]}, "Hello", "message"),
    "a system message": ({"input": [said("system", "Be kind."), said("user", "Say hello.")]}, "Hello", "message"),
    "a tool": ({"input": [said("user", "The weather?")], "tools": [WEATHER]}, CALL, "function_call"),
    "an image": ({"input": [said("user", IMAGE)]}, "A heart", "message"),
    "several turns": (
        {"input": [said("user", "I am Alice."), said("assistant", "Hello!"), said("user", "Who am I?")]},
        "Alice",
        "message",
    ),
}


@pytest.fixture
def api(hermes: Tokenizer) -> ResponsesServer:
    return ResponsesServer(hermes)


@pytest.mark.parametrize("check", CHECKS)
async def test_answers(api: ResponsesServer, check: str) -> None:
    body, words, kind = CHECKS[check]
    api.say(words)
    answer = await api.post(**body)
    assert answer.status_code == 200, answer.text
    jsonschema.validate(answer.json(), RESPONSE)
    assert answer.json()["status"] == "completed"
    assert kind in [item["type"] for item in answer.json()["output"]]


@pytest.mark.parametrize("check", ["a text", "a tool", "an image"])
async def test_streams(api: ResponsesServer, check: str) -> None:
    body, words, kind = CHECKS[check]
    api.say(f"<think>\nHm.\n</think>\n{words}", pause=0.001)
    events = await api.events(**body)
    for number, event in enumerate(events):
        jsonschema.validate(event, needs(sequence_number={"const": number}, **EVENTS[event["type"]]))
    assert events[-1]["type"] == "response.completed"
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", kind]
    if kind == "function_call":
        added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
        assert added == ["reasoning", kind]
        deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
        assert json.loads("".join(deltas)) == {"location": "San Francisco"}
