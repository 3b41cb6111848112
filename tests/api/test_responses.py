"""/v1/responses over a fake engine: shapes, streams, tools, stored conversations, errors; and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from miniserve.api.responses.schemas import OUTPUT, messages_of
from miniserve.api.responses.store import ResponseStore, Stored
from miniserve.dispatcher import EngineError
from miniserve.text.formats import FORMATS
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.api import error_of, serving
from tests.support.fake_engine import FakeClient, FakeTurn

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = FORMATS["hermes"].write([("weather", {"city": "Paris"})])
THOUGHT = "<think>\nHm.\n</think>\n\n"


class Engine(FakeClient):
    """Numbers conversations as a scheduler would, and notes which one each turn asked for."""

    def submit(self, *args: Any, **options: Any) -> FakeTurn:
        turn = super().submit(*args, **options)
        self.asked = [*getattr(self, "asked", []), turn.conversation]
        turn.conversation = turn.conversation or len(self.turns)
        return turn


class Api(dialects.Server):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, Engine(), "/v1")
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
        *told, rest = response.text.split("\n\n")
        assert rest == ""
        events = []
        for number, lines in enumerate(told):
            name, data = lines.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert (name, number) == (f"event: {event['type']}", event["sequence_number"])
            events.append(event)
        return events


@pytest.fixture
def api(hermes: Tokenizer) -> Api:
    return Api(hermes)


def bare(value: Any) -> Any:
    """Without ids and times."""
    if isinstance(value, list):
        return [bare(item) for item in value]
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key not in ("id", "call_id") and key[-3:] != "_at"}
    return value


# --- shapes ---------------------------------------------------------------------------------------------------------


async def test_an_answer(api: Api) -> None:
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
        "instructions": "Be short.",
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 0.9,
        "truncation": "disabled",
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
async def test_streams_tell_what_whole_answers_do(api: Api, text: str, kinds: list[str]) -> None:
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
        told = "".join(e["delta"] for e in own if e["type"].endswith(".delta"))
        assert told == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


@pytest.mark.parametrize("text", ["Hello", f"{THOUGHT}Hello", "<think>\nHm, I"])
async def test_cut_off(api: Api, text: str) -> None:
    api.say(text, finish="length")
    whole = await api.whole(max_output_tokens=50)
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][-1]["status"] == "incomplete"
    assert all(item["status"] == "completed" for item in whole["output"][:-1])
    assert api.engine.turns[0].params.max_tokens == 50
    events = await api.events(max_output_tokens=50)
    assert events[-1]["type"] == "response.incomplete"
    assert bare(events[-1]["response"]) == bare(whole)


# --- requests -------------------------------------------------------------------------------------------------------


async def test_requests_reach_the_engine_as_chats_do(api: Api) -> None:
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
    ],
)
async def test_tool_choice(api: Api, choice: Any, chat_choice: Any) -> None:
    function = {key: value for key, value in WEATHER.items() if key != "type"}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": function}]}
    await api.http.post("/chat/completions", json={**chat, "tool_choice": chat_choice})
    assert (await api.whole(tools=[WEATHER], tool_choice=choice))["tool_choice"] == choice
    one, two = api.engine.turns
    assert one.params == two.params
    assert (one.params.grammar is None) == (choice == "none")


async def test_formats(api: Api) -> None:
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
        return messages_of(OUTPUT.validate_python(list(items)))

    text = {"role": "assistant", "content": "a"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]}
    assert said(text, text) == [text, text]
    assert said(text, call, text)[0]["content"] == "aa"
    assert [len(m) for m in said(thought, text, thought, call)] == [3, 3]
    assert said({"type": "reasoning", "summary": []}, text) == [text]


# --- conversations that are stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_previous_response(api: Api, stream: bool) -> None:
    """Going on with a stored response is the same as sending all of the conversation again."""

    async def ask(**body: Any) -> dict[str, Any]:
        return (await api.events(**body))[-1]["response"] if stream else await api.whole(**body)

    api.say(f"{THOUGHT}I look.\n{CALL}")
    first = await ask(tools=[WEATHER], instructions="Now only.")
    call_id = first["output"][-1]["call_id"]
    result = [{"type": "function_call_output", "call_id": call_id, "output": "Rain"}]
    api.say("It rains.")
    second = await ask(input=result, previous_response_id=first["id"], tools=[WEATHER])
    assert second["previous_response_id"] == first["id"]
    third = await ask(input="Thanks", previous_response_id=second["id"], tools=[WEATHER])
    assert third["id"] not in (first["id"], second["id"])
    continued = api.engine.turns[-1].tokens
    whole = [{"role": "user", "content": "Hi"}, *first["output"], *result, *second["output"]]
    await ask(input=[*whole, {"role": "user", "content": "Thanks"}], tools=[WEATHER])
    assert api.engine.turns[-1].tokens == continued
    assert "Now only." not in api.prompt
    assert "I look." in api.prompt
    assert "Hm." in api.prompt
    # The scheduler is told the conversation, not only shown a prompt that resembles the last one.
    assert api.engine.asked == ["", 1, 1, ""]  # type: ignore[attr-defined]


async def test_forks(api: Api) -> None:
    first = await api.whole(input="One")
    for _ in range(2):
        fork = await api.whole(input="Two", previous_response_id=first["id"])
    await api.whole(input="Three", previous_response_id=fork["id"])
    assert "One" in api.prompt
    assert api.prompt.count("Two") == 1
    # The second one is for the scheduler to place by its prompt; it has a conversation of its own then.
    assert api.engine.asked == ["", 1, "", 3]  # type: ignore[attr-defined]


async def test_forks_at_the_same_time_and_retries(api: Api) -> None:
    first = await api.whole(input="One")
    api.engine.refuse = EngineError("No decoder is alive.")
    error_of(await api.post(previous_response_id=first["id"]), 503)
    api.engine.refuse = None
    await asyncio.gather(*(api.whole(input=text, previous_response_id=first["id"]) for text in "abc"))
    assert sorted(api.engine.asked, key=str) == ["", "", "", 1]  # type: ignore[attr-defined]


async def test_ids_of_conversations_that_clients_choose(api: Api) -> None:
    response = await api.http.post("/responses", json={"input": "a"}, headers={"X-Conversation-ID": "mine"})
    await api.whole(input="b", previous_response_id=response.json()["id"])
    await api.whole(input="c", previous_response_id=response.json()["id"], prompt_cache_key="other")
    assert api.engine.asked == ["mine", "mine", "other"]  # type: ignore[attr-defined]


async def test_what_is_not_stored(api: Api) -> None:
    kept = await api.whole(store=False)
    assert kept["store"] is False
    for id in (kept["id"], "resp_unknown", "x" * 200):
        error = error_of(await api.post(previous_response_id=id), 404)
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
        assert "whole conversation as `input`" in error["message"]
    # Clients do not choose ids: a response could be replaced by another one of the same id.
    ids = [(await api.http.post("/responses", json={"input": "a"}, headers={"X-Request-Id": "q"})).json()["id"]]
    ids += [(await api.http.post("/responses", json={"input": "a"}, headers={"X-Request-Id": "q"})).json()["id"]]
    assert ids[0] != ids[1]


async def test_failures_are_not_stored(api: Api) -> None:
    api.say("Hel", finish="error", error="The engine broke.")
    events = await api.events()
    assert [e["type"] for e in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["message"] == "The engine broke."
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    error_of(await api.post(previous_response_id=failed["id"]), 404)


@pytest.mark.parametrize("stream", [False, True])
async def test_stored_responses_can_be_read_and_deleted(api: Api, stream: bool) -> None:
    api.say(f"{THOUGHT}I look.\n{CALL}")
    options: dict[str, Any] = {"tools": [WEATHER], "metadata": {"a": "b"}}
    answer = (await api.events(**options))[-1]["response"] if stream else await api.whole(**options)
    behind = await api.whole(previous_response_id=answer["id"])
    assert (await api.http.get(f"/responses/{answer['id']}")).json() == answer
    assert (await api.openai.responses.retrieve(answer["id"])).output_text == "I look."
    refused = error_of(await api.http.get(f"/responses/{answer['id']}", params={"stream": "true"}), 400)
    assert refused["param"] == "stream"
    deleted = await api.http.delete(f"/responses/{answer['id']}")
    assert deleted.json() == {"id": answer["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        error = error_of(await api.http.request(method, f"/responses/{answer['id']}"), 404)
        assert (error["code"], answer["id"] in error["message"]) == ("response_not_found", True)
    error_of(await api.post(previous_response_id=answer["id"]), 404)
    # What has gone on behind it goes on.
    await api.whole(previous_response_id=behind["id"])
    assert "I look." in api.prompt
    await api.openai.responses.delete(behind["id"])
    with pytest.raises(openai.NotFoundError, match="no response"):
        await api.openai.responses.retrieve(behind["id"])


def test_the_store_is_bounded() -> None:
    store: ResponseStore[int] = ResponseStore(max_responses=3, max_tokens=100)
    for number in range(4):
        store.put(str(number), Stored((number,), 10, ""))
    assert store.get("0") is None
    assert store.get("1") is not None  # and is the latest used now
    store.put("4", Stored((), 85, ""))
    assert [store.get(id) is not None for id in "1234"] == [True, False, False, True]
    store.put("5", Stored((), 101, ""))
    assert len(store) == 0
    store.put("6", Stored((), 100, ""))
    assert len(store) == 1
    store.put("7", Stored((), 50, "", b"x" * 204))
    assert len(store) == 0
    assert not store.delete("7")
    store.put("8", Stored((), 50, "", b"x" * 200))
    assert store.delete("8")
    store.put("9", Stored((), 100, ""))
    assert len(store) == 1


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "string or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'item_reference'"),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "'computer_call'"),
        ({"input": [{"content": "x"}]}, "input[0]", "without a `type`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "'input_image'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'assistant'"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "missing"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "None"),
        ({"input": "x" * 5000}, "input", "maximum context length"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "'web_search'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]", "beside `type`"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "`tools[0].name` must be"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"tool_choice": 5}, "tool_choice", "or an object"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "needs `schema`"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "text.format", "cannot be followed"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 5000}, "input", "maximum context length"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"include": ["message.output_text.logprobs"]}, "include", "cannot be included"),
        ({"background": True}, "background", "use `stream`"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "not supported"),
        ({"model": "other"}, "model", "no model"),
    ],
)
async def test_bad_requests(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(await api.post(**body), 404 if param == "model" else 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not api.engine.turns


async def test_what_is_ignored_is_told(api: Api) -> None:
    body = {"user": "me", "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}, "é": 1}
    response = await api.post(**body, service_tier="auto", background=False, reasoning={"summary": "auto"})
    told = response.headers["x-ignored-parameters"]
    assert told == "..., include, reasoning.summary, service_tier, text.verbosity, user"
    assert "x-ignored-parameters" not in (await api.post()).headers
    streamed = await api.post(stream=True, user="me")
    assert streamed.headers["x-ignored-parameters"] == "user"


async def test_the_engine_refuses(api: Api) -> None:
    api.engine.refuse = EngineError("No decoder is alive.")
    assert error_of(await api.post(), 503)["message"] == "No decoder is alive."
    assert error_of(await api.post(stream=True), 503)["code"] == "engine_unavailable"


@pytest.mark.parametrize("path", ["responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels(hermes: Tokenizer, stream: bool, path: str) -> None:
    api = Api(hermes)
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


# --- OpenAI's client ------------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str


async def test_openai_client(api: Api) -> None:
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
