"""/v1/messages over a fake engine: shapes, streams, tools, errors; and Anthropic's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import pytest

from miniserve.dispatcher import EngineError
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.api import HI
from tests.support.servers import CALL, THOUGHT, Server

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
CHAT_WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA},
}


class MessagesServer(Server):
    def __init__(self, tokenizer: Tokenizer, **config: Any) -> None:
        super().__init__(tokenizer, "/v1", **config)
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.app))
        self.anthropic = anthropic.AsyncAnthropic(
            base_url="http://test", api_key="key", http_client=client, max_retries=0
        )

    async def post(self, path: str = "", **body: Any) -> httpx.Response:
        return await self.http.post(f"/messages{path}", json={"messages": HI, "max_tokens": 500, **body})

    async def whole(self, **body: Any) -> dict[str, Any]:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, **body: Any) -> list[dict[str, Any]]:
        response = await self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        *pieces, rest = response.text.split("\n\n")
        assert rest == ""
        events = []
        for lines in pieces:
            name, data = lines.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events


@pytest.fixture
def api(hermes: Tokenizer) -> MessagesServer:
    return MessagesServer(hermes)


def error_of(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body == {
        "type": "error",
        "error": {"type": kind, "message": body["error"]["message"]},
        "request_id": response.headers["request-id"],
    }
    return body["error"]["message"]


# --- shapes ---------------------------------------------------------------------------------------------------------


async def test_an_answer(api: MessagesServer) -> None:
    answer = await api.whole(system=[{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}])
    assert api.prompt == "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(api.engine.turns[0].tokens) - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": len(api.tokenizer.encode("Hello")) + 1,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("Hello", ["text"], "end_turn"),
        ("", [], "end_turn"),
        (f"{THOUGHT}Hello", ["thinking", "text"], "end_turn"),
        (f"{THOUGHT}I look.\n{CALL}\n{CALL}", ["thinking", "text", "tool_use", "tool_use"], "tool_use"),
        ("One STOP two", ["text"], "stop_sequence"),
        ("<think>\nHm", ["thinking"], "max_tokens"),
    ],
)
async def test_streams_equal_whole_answers(api: MessagesServer, text: str, kinds: list[str], reason: str) -> None:
    api.say(text, pause=0.001, **({"finish": "length"} if reason == "max_tokens" else {}))
    whole = await api.whole(tools=[WEATHER], stop_sequences=["STOP"])
    start, ping, *events, delta, stop = await api.events(tools=[WEATHER], stop_sequences=["STOP"])
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("STOP" if reason == "stop_sequence" else None)
    assert ping == {"type": "ping"}
    assert stop == {"type": "message_stop"}
    blocks: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                blocks.append(event["content_block"])
                texts = ""
            case "content_block_delta":
                (value,) = [event["delta"][key] for key in event["delta"] if key != "type"]
                texts += value
            case "content_block_stop":
                kind = blocks[-1]["type"]
                blocks[-1]["input" if kind == "tool_use" else kind] = json.loads(texts) if kind == "tool_use" else texts
        assert event["index"] == len(blocks) - 1
    message = {**start["message"], **delta["delta"], "content": blocks, "usage": delta["usage"]}
    for found in (message, whole):
        found.pop("id")
        for block in found["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("call_")
                assert block == {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}
    assert message == whole


# --- requests -------------------------------------------------------------------------------------------------------


async def test_requests_reach_the_engine_as_chats_do(api: MessagesServer) -> None:
    """The same conversation in both spellings has the same prompt and parameters."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    chat = {
        "messages": [
            {"role": "system", "content": "Rules.\nMore."},
            {"role": "user", "content": "a\nb"},
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "c1", **call}, {"id": "c2", **call}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
            {"role": "tool", "tool_call_id": "c2", "content": "Error: Fog"},
            {"role": "user", "content": "Well?"},
        ],
        "tools": [CHAT_WEATHER],
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 7,
        "max_tokens": 77,
        "stop": ["END"],
        "cache_salt": "salt",
    }
    use = {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}
    body = {
        "system": [{"type": "text", "text": "Rules."}, {"type": "text", "text": "More."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "I look."},
                    {**use, "id": "c1"},
                    {**use, "id": "c2"},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "Rain"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "c2",
                        "content": [{"type": "text", "text": "Fog"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
        "tools": [{**WEATHER, "cache_control": {"type": "ephemeral"}}],
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 7,
        "max_tokens": 77,
        "stop_sequences": ["END"],
        "cache_salt": "salt",
    }
    headers = {"X-Conversation-ID": "mine"}
    await api.http.post("/chat/completions", json=chat, headers=headers)
    assert (await api.http.post("/messages", json=body, headers=headers)).status_code == 200
    one, two = api.engine.turns
    assert (one.tokens, one.params, one.conversation, one.salt) == (two.tokens, two.params, two.conversation, two.salt)
    counted = await api.post("/count_tokens", **body)
    assert counted.json() == {"input_tokens": len(one.tokens)}


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
async def test_tool_choice(api: MessagesServer, choice: Any, chat_choice: Any) -> None:
    chat = {"messages": HI, "tools": [CHAT_WEATHER], "max_tokens": 500, "tool_choice": chat_choice}
    await api.http.post("/chat/completions", json=chat)
    await api.whole(tools=[WEATHER], tool_choice=choice)
    one, two = api.engine.turns
    assert one.params == two.params
    assert (one.params.grammar is None) == (choice["type"] in ("none", "auto"))


async def test_one_call_at_most(api: MessagesServer) -> None:
    api.say(f"{CALL}\n{CALL}")
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len((await api.whole(tools=[WEATHER], tool_choice=choice))["content"]) == 1
    assert len((await api.whole(tools=[WEATHER]))["content"]) == 2


async def test_a_prompt_is_left_in_the_cache(api: MessagesServer) -> None:
    api.engine.play = lambda prompt, params: {"steps": [[]], "finish": "length"}
    answer = await api.whole(max_tokens=0, tools=[WEATHER])
    assert (answer["content"], answer["stop_reason"], answer["usage"]["output_tokens"]) == ([], "max_tokens", 0)
    assert api.engine.turns[-1].params.max_tokens == 0
    assert (await api.events(max_tokens=0))[-2]["delta"]["stop_reason"] == "max_tokens"


async def test_null_is_nothing(api: MessagesServer) -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": None}
    await api.whole(messages=[*HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": None}])
    prompt = api.prompt
    await api.whole(messages=[*HI, {"role": "assistant", "content": [{**call, "input": {}}]}, {**HI[0], "content": ""}])
    assert api.prompt == prompt


@pytest.mark.parametrize("inner", ["INNER", [{"type": "text", "text": "INNER"}, {"type": "image"}]])
async def test_a_document_of_blocks_is_text(api: MessagesServer, inner: Any) -> None:
    block = {"type": "document", "title": "T", "source": {"type": "content", "content": inner}}
    await api.whole(messages=[{"role": "user", "content": [block, {"type": "browser_state"}]}])
    assert "T\nINNER" in api.prompt


async def test_an_answer_that_has_begun_goes_on(api: MessagesServer) -> None:
    await api.whole(messages=[*HI, {"role": "assistant", "content": "I thi"}])
    assert api.prompt.endswith("<|im_start|>assistant\nI thi")


async def test_thinking_and_formats(tmp_path: Path) -> None:
    template = dialects.TEMPLATES["hermes"] + "{{ '<think></think>' if enable_thinking is false else '' }}"
    api = MessagesServer(dialects.tokenizer(tmp_path, "hermes", template))
    for thinking, off in (({"type": "disabled"}, True), ({"type": "enabled", "budget_tokens": 1024}, False)):
        await api.whole(thinking=thinking)
        assert api.prompt.endswith("<think></think>") == off
    await api.whole(output_config={"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"})
    grammar = api.engine.turns[-1].params.grammar
    assert grammar is not None
    assert '"city"' in grammar.text


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "`max_tokens`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "without a `type`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "`messages[0].content[0]`: a message of the role 'user' cannot hold",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
                ]
            },
            "ends with a `tool_use`",
        ),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt is too long: 5017 tokens > 4095 maximum"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "'x' are not supported"),
        ({"tools": [{"name": "f"}]}, "`tools[0].input_schema` is missing"),
        ({"tools": [{"name": "a b", "input_schema": SCHEMA}]}, "`tools[0].name` must be"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "`tools[0].input_schema` must be"),
        ({"tool_choice": {"type": "any"}}, "needs `tools`"),
        ({"tool_choice": {"type": "tool"}}, '"tool" with `name`'),
        ({"stop_sequences": [""]}, "`stop_sequences[0]`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "`output_config.format`"),
        ({"tools": [WEATHER, WEATHER]}, "Two tools are called 'weather'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}, {**WEATHER, "name": "a b"}]}, "`tools[1].name` must"),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, "use `output_config.format`"),
        ({"stop": ["x"]}, "use `stop_sequences`"),
    ],
)
async def test_bad_requests(api: MessagesServer, body: dict[str, Any], words: str) -> None:
    assert words in error_of(await api.post(**body), 400, "invalid_request_error")
    assert not api.engine.turns


async def test_errors_of_all_kinds(hermes: Tokenizer) -> None:
    api = MessagesServer(hermes, api_key="key", max_body_bytes=1000)
    error_of(await api.post(), 401, "authentication_error")
    for headers in ({"x-api-key": "key"}, {"Authorization": "Bearer key"}):
        api.http.headers = httpx.Headers(headers)
        assert (await api.post()).status_code == 200
        assert (await api.http.get("/models")).status_code == 200
    error_of(await api.post(model="other"), 404, "not_found_error")
    error_of(await api.post("/count_tokens", model="other"), 404, "not_found_error")
    error_of(await api.post("/batches"), 404, "not_found_error")
    error_of(await api.post(system="x" * 2000), 413, "request_too_large")
    error_of(await api.http.post("/messages", content=b"{"), 400, "invalid_request_error")
    api.engine.refuse = EngineError("No decoder is alive.")
    error_of(await api.post(), 503, "overloaded_error")
    api.engine.refuse = None
    api.say("Hel", finish="error", error="The engine broke.")
    error_of(await api.post(), 500, "api_error")
    events = await api.events()
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "The engine broke."}}


async def test_ignored_parameters_are_named(api: MessagesServer) -> None:
    tools = [{**WEATHER, "cache_control": {"type": "ephemeral"}}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    response = await api.post(metadata={"user_id": "me"}, service_tier="auto", thinking=thinking, tools=tools)
    ignored = response.headers["x-ignored-parameters"]
    assert ignored == "metadata, thinking.budget_tokens, tools.cache_control"
    system = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}]
    counted = await api.http.post(
        "/messages/count_tokens", json={"messages": HI, "system": system, "user_profile_id": "x"}
    )
    assert counted.headers["x-ignored-parameters"] == "system[].cache_control, user_profile_id"


# --- Anthropic's client ---------------------------------------------------------------------------------------------


async def test_anthropic_client(hermes: Tokenizer) -> None:
    api = MessagesServer(hermes, api_key="key")
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "tools": [WEATHER]}
    api.say(f"{THOUGHT}I look.\n{CALL}")
    first = await api.anthropic.messages.create(messages=HI, **options)
    thought, text, use = first.content
    assert (thought.type, text.type, use.type, first.stop_reason) == ("thinking", "text", "tool_use", "tool_use")
    assert use.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain"}
    messages: list[Any] = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    async with api.anthropic.messages.stream(messages=messages, **options) as stream:
        kinds = [event.type async for event in stream]
        second = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert second.content[2].input == {"city": "Paris"}
    assert second.usage.cache_read_input_tokens == 3
    assert "Rain" in api.prompt
    assert (
        await api.anthropic.messages.count_tokens(model="tiny", messages=messages, tools=[WEATHER])
    ).input_tokens == len(api.engine.turns[-1].tokens)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    await api.anthropic.messages.create(messages=image, **options)
    assert "[image: this model reads text only]" in api.prompt
    api.say("Hel", finish="error", error="The engine broke.")
    with pytest.raises(anthropic.APIStatusError, match="The engine broke"):
        async with api.anthropic.messages.stream(messages=HI, **options) as stream:
            await stream.get_final_message()
