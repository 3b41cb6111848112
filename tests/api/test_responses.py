"""/v1/responses over a fake engine: shapes, streams, tools, errors; and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from miniserve.api.responses.items import OUTPUT, messages_of
from miniserve.dispatcher import EngineError
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import error_of, serving
from tests.support.servers import CALL, THOUGHT, WEATHER, ResponsesServer, bare


@pytest.fixture
def api(hermes: Tokenizer) -> ResponsesServer:
    return ResponsesServer(hermes)


# --- shapes -----------------------------------------------------------------------------------------------------------


async def test_an_answer(api: ResponsesServer) -> None:
    answer = await api.whole(instructions="Be short.", temperature=0.5, top_p=0.9, metadata={"a": "b"}, store=True)
    assert (
        api.prompt == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer["id"].startswith("resp_")
    assert answer["output"][0].pop("id").startswith("msg_")
    prompt, output = len(api.engine.turns[0].tokens), answer["usage"]["output_tokens"]
    assert output == len(api.tokenizer.encode("Hello")) + 1
    assert bare(answer) == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "tiny",
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
            }
        ],
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + output,
        },
        "background": False,
        "frequency_penalty": 0.0,
        "instructions": "Be short.",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 0.9,
        "truncation": "disabled",
        "user": None,
    }


TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
REASONING = [name.replace("output_text", "reasoning_text") for name in TEXT]
CALLED = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Hello", ["message"]),
        ("", ["message"]),
        (f"{THOUGHT}Hello", ["reasoning", "message"]),
        (f"{THOUGHT}I look.\n{CALL}\n{CALL}", ["reasoning", "message", "function_call", "function_call"]),
        (f"{CALL}\nSo.", ["function_call", "message"]),
    ],
)
async def test_streams_equal_whole_answers(api: ResponsesServer, text: str, kinds: list[str]) -> None:
    api.say(text, pause=0.001)
    whole = await api.whole(tools=[WEATHER])
    events = await api.events(tools=[WEATHER])
    assert [item["type"] for item in whole["output"]] == kinds
    assert bare(events[-1]["response"]) == bare(whole)
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"] == events[1]["response"]
    names = [e["type"].removeprefix("response.") for e in events[2:-1]]
    runs = [name for i, name in enumerate(names) if names[i - 1 : i] != [name]]
    of_kind = {"message": [*TEXT, "output_item.done"], "reasoning": [*REASONING, "output_item.done"]}
    expected = [name for kind in kinds for name in {**of_kind, "function_call": CALLED}[kind]]
    assert runs == [name for name in expected if text or name != "output_text.delta"]
    for index, item in enumerate(events[-1]["response"]["output"]):
        own = [e for e in events if e.get("output_index") == index]
        assert own[0]["item"]["id"] == own[-1]["item"]["id"] == item["id"]
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["item"] == item
        assert {e["item_id"] for e in own[1:-1]} == {item["id"]}
        streamed = "".join(e["delta"] for e in own if e["type"].endswith(".delta"))
        assert streamed == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


@pytest.mark.parametrize("text", ["Hello", f"{THOUGHT}Hello", "<think>\nHm, I"])
async def test_cut_off(api: ResponsesServer, text: str) -> None:
    api.say(text, finish="length")
    whole = await api.whole(max_output_tokens=50)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][-1]["status"] == "incomplete"
    assert all(item["status"] == "completed" for item in whole["output"][:-1])
    assert api.engine.turns[0].params.max_tokens == 50
    events = await api.events(max_output_tokens=50)
    assert events[-1]["type"] == "response.incomplete"
    assert bare(events[-1]["response"]) == bare(whole)


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_requests_reach_the_engine_as_chats_do(api: ResponsesServer) -> None:
    """The same conversation in both spellings has the same prompt and parameters."""
    arguments = '{"city": "Paris"}'
    items = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "m", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": arguments, "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Sun"}]},
    ]  # fmt: skip
    function = {key: value for key, value in WEATHER.items() if key != "type"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    chat = {
        "messages": [
            {"role": "system", "content": "Rules."},
            {"role": "user", "content": "a\nb"},
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "Hm.",
                "tool_calls": [{"id": "c1", **call}, {"id": "c2", **call}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
            {"role": "tool", "tool_call_id": "c2", "content": "Sun"},
        ],
        "tools": [{"type": "function", "function": function}],
        "temperature": 0.3,
        "top_p": 0.5,
        "max_tokens": 77,
        "reasoning_effort": "low",
        "prompt_cache_key": "key",
        "cache_salt": "salt",
    }
    assert (await api.http.post("/chat/completions", json=chat)).status_code == 200
    await api.whole(
        input=items,
        tools=[{**WEATHER, "strict": None}],
        temperature=0.3,
        top_p=0.5,
        max_output_tokens=77,
        reasoning={"effort": "low"},
        prompt_cache_key="key",
        cache_salt="salt",
    )
    one, two = api.engine.turns
    assert (one.tokens, one.params, one.conversation, one.salt) == (two.tokens, two.params, two.conversation, two.salt)


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "tool", "name": "weather"}),
    ],
)
async def test_tool_choice(api: ResponsesServer, choice: Any, chat_choice: Any) -> None:
    function = {key: value for key, value in WEATHER.items() if key != "type"}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": function}]}
    await api.http.post("/chat/completions", json={**chat, "tool_choice": chat_choice})
    assert (await api.whole(tools=[WEATHER], tool_choice=choice))["tool_choice"] == choice
    one, two = api.engine.turns
    assert one.params == two.params
    assert (one.params.grammar is None) == (choice == "none")


async def test_formats(api: ResponsesServer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "out", "schema": schema, "strict": True}
    assert (await api.whole(text={"format": form}))["text"] == {"format": form}
    await api.whole(text={"format": {"type": "json_object"}})
    await api.whole(text={"format": {"type": "text"}})
    grammars = [turn.params.grammar for turn in api.engine.turns]
    assert '"a"' in grammars[0].text
    assert "%json" in grammars[1].text
    assert grammars[2] is None


def test_answers_of_several_items_are_one_message() -> None:
    def said(*items: dict[str, Any]) -> list[dict[str, Any]]:
        return messages_of(OUTPUT.validate_python(list(items)))[0]

    text = {"role": "assistant", "content": "a"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]}
    assert said(text, text) == [text, text]
    assert said(text, call, text)[0]["content"] == "aa"
    assert [len(m) for m in said(thought, text, thought, call)] == [3, 3]
    assert said({"type": "reasoning", "summary": []}, text) == [text]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": 5}, "input", "string or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'item_reference'"),
        ({"input": [{"content": "x"}]}, "input[0]", "without a `type`"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'assistant'"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "missing"),
        ({"input": "x" * 5000}, "input", "maximum context length"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]", "beside `type`"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "`tools[0].name` must be"),
        # Places are the client's, whatever stands before them and is left out.
        ({"tools": [{"type": "mcp"}, {"type": "function"}]}, "tools[1].name", "not 'None'"),
        ({"tools": [{"type": "function", "name": ["f"]}]}, "tools[0].name", "letters"),
        ({"tools": [{"type": "custom", "name": {}}]}, "tools[0].name", "letters"),
        ({"tools": [{"type": "namespace", "tools": [WEATHER]}]}, "tools[0].tools[0].name", "letters"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].name", "1"),
        ({"tools": [WEATHER, {"type": "function", "name": "f", "parameters": []}]}, "tools[1].parameters", "schema"),
        ({"input": [{"type": "additional_tools", "tools": [{"type": "function"}]}]}, "input[0].tools", "letters"),
        ({"response_format": {"type": "json_object"}}, "response_format", "use `text.format`"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": 5}, "tool_choice", "or an object"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search'"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "must be"),
        ({"tools": [{"name": "f"}]}, "tools[0]", "no `type`"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation", "not both"),
        ({"input": [{"type": "nonsense"}]}, "input[0]", "'nonsense'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "needs `schema`"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "text.format", "cannot be followed"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"background": True}, "background", "use `stream`"),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"model": "other"}, "model", "no model"),
    ],
)
async def test_bad_requests(api: ResponsesServer, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(await api.post(**body), 404 if param == "model" else 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not api.engine.turns


async def test_ignored_parameters_are_named(api: ResponsesServer) -> None:
    body = {"user": "me", "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}, "é": 1}
    response = await api.post(**body, service_tier="auto", background=False, reasoning={"summary": "auto"})
    ignored = response.headers["x-ignored-parameters"]
    assert ignored == "..., include, reasoning.summary, text.verbosity, user"
    assert "x-ignored-parameters" not in (await api.post()).headers
    others = {"type": "additional_tools", "tools": [{"type": "web_search"}]}
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    response = await api.post(input=[others, thought], top_logprobs=2)
    ignored = response.headers["x-ignored-parameters"]
    assert ignored == "input[].encrypted_content, input[].tools.web_search, top_logprobs"
    streamed = await api.post(stream=True, user="me")
    assert streamed.headers["x-ignored-parameters"] == "user"


async def test_the_engine_refuses(api: ResponsesServer) -> None:
    api.engine.refuse = EngineError("No decoder is alive.")
    assert error_of(await api.post(), 503)["message"] == "No decoder is alive."
    assert error_of(await api.post(stream=True), 503)["code"] == "engine_unavailable"


@pytest.mark.parametrize("path", ["responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels(hermes: Tokenizer, stream: bool, path: str) -> None:
    api = ResponsesServer(hermes)
    api.say("A" * 2000, pause=0.01)
    own: dict[str, Any] = {"input": "Hi"}
    if path == "messages":
        own = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
    body = json.dumps({**own, "stream": stream}).encode()
    async with serving(api.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            await reader.readuntil(b"delta")
        while not api.engine.turns:
            await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(2):
            await api.engine.turns[0].cancelled.wait()


@pytest.mark.parametrize("item", [
    {"role": "assistant", "content": None},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": None},
    {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": None},
    {"type": "function_call_output", "call_id": "c", "output": None},
])  # fmt: skip
async def test_null_is_no_text(api: ResponsesServer, item: dict[str, Any]) -> None:
    await api.whole(input=[item])
    prompt = api.prompt
    await api.whole(input=[{key: "" if value is None else value for key, value in item.items()}])
    assert api.prompt == prompt


async def test_allowed_tools_that_are_left_out(api: ResponsesServer) -> None:
    api.say(CALL)
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    answer = await api.whole(tools=[WEATHER, {"type": "web_search"}], tool_choice=choice)
    assert [item["type"] for item in answer["output"]] == ["message"]


DEEP = "[" * 150 + "]" * 150
CUSTOM = {"type": "custom", "name": "weather"}
SEARCH = {"type": "tool_search", "execution": "client"}


@pytest.mark.parametrize(("tool", "name", "arguments", "expected"), [
    (CUSTOM, "weather", '{"input": {"a": 1}}', {"input": '{"a": 1}'}),
    (CUSTOM, "weather", '{"input": ' + "[" * 50_000, {"input": '{"input": ' + "[" * 50_000}),
    (SEARCH, "tool_search", f'{{"query": {DEEP}}}', {"arguments": {}}),
])  # fmt: skip
async def test_odd_arguments_of_calls(
    api: ResponsesServer, tool: dict[str, Any], name: str, arguments: str, expected: dict[str, Any]
) -> None:
    api.engine.max_model_len = 2**20
    api.say(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    item = (await api.events(tools=[tool]))[-1]["response"]["output"][0]
    assert item | expected == item


# --- OpenAI's client --------------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str


async def test_openai_client(api: ResponsesServer) -> None:
    api.say(f"{THOUGHT}I look.\n{CALL}")
    first = await api.openai.responses.create(model="tiny", input="Hi", tools=[WEATHER])  # type: ignore[list-item]
    thought, message, call = first.output
    assert (thought.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert thought.content[0].text == "Hm."
    assert first.output_text == "I look."
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    assert first.usage.input_tokens_details.cached_tokens == 3

    api.say("It rains.")
    result = [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}]
    kinds = []
    async with api.openai.responses.stream(
        model="tiny",
        input=result,  # type: ignore[arg-type]
        previous_response_id=first.id,
        tools=[WEATHER],  # type: ignore[list-item]
    ) as stream:
        async for event in stream:
            kinds.append(event.type)
        second = await stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert second.output_text == "It rains."
    assert second.previous_response_id == first.id

    # What it has parsed can be sent back as it is.
    again = [
        {"role": "user", "content": "Hi"},
        *first.output,
        *result,
        *second.output,
        {"role": "user", "content": "So"},
    ]
    third = await api.openai.responses.create(model="tiny", input=again)  # type: ignore[arg-type]
    assert third.status == "completed"

    api.say('{"name": "Paris"}')
    parsed = await api.openai.responses.parse(
        model="tiny", input="Which?", text_format=City, previous_response_id=third.id
    )
    assert parsed.output_parsed == City(name="Paris")
    async with api.openai.responses.stream(model="tiny", input="Which?", text_format=City) as stream:
        assert (await stream.get_final_response()).output_parsed == City(name="Paris")

    api.say("Hel", finish="length")
    cut = await api.openai.responses.create(model="tiny", input="Hi", max_output_tokens=3)
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.NotFoundError, match="whole conversation"):
        await api.openai.responses.create(model="tiny", input="Hi", previous_response_id="resp_gone")
    api.say("Hel", finish="error", error="The engine broke.")
    events = [e async for e in await api.openai.responses.create(model="tiny", input="Hi", stream=True)]
    assert [e.type for e in events[-2:]] == ["error", "response.failed"]
