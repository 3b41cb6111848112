"""Tool calls over the API: read, streamed, forced, refused; with a fake engine that writes them in every format."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from miniserve.text.calls import sound
from miniserve.text.formats import FORMATS
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.api import HI
from tests.support.dialects import CALLS, FORMS, PERSON, TOOLS, called, conversation, tool
from tests.support.servers import ChatServer, ResponsesServer


@pytest.mark.parametrize("form", FORMS)
async def test_chat_with_calls(tokenizers: dict[str, Tokenizer], form: str) -> None:
    api = ChatServer(tokenizers[form])
    api.say(("" if form == "llama3_json" else "I look.\n") + FORMATS[form].write(CALLS))
    one, two = await api.answers(tools=TOOLS)
    assert one == two
    assert one["message"] == {
        "role": "assistant",
        "content": None if form == "llama3_json" else "I look.",
        "refusal": None,
        "tool_calls": one["message"]["tool_calls"],
    }
    assert one["finish_reason"] == "tool_calls"
    functions = [call["function"] for call in one["message"]["tool_calls"]]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == CALLS
    assert one["usage"]["completion_tokens"] == len(list(api.engine.turns[0].steps))


async def test_text_streams_while_it_cannot_be_a_call(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["smollm2"])
    api.say("a <b> <tool> c\n<tool_call>{}</tool_call> <tool_ca")
    api_play = api.engine.play
    api.engine.play = lambda prompt, params: {**api_play(prompt, params), "pause": 0.001}
    response = await api.post(stream=True, tools=TOOLS)
    chunks = [json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n")[:-2]]
    pieces = [chunk["delta"]["content"] for chunk in chunks if chunk["delta"].get("content")]
    assert pieces[:2] == ["a", " <b"]
    assert "".join(pieces) == "a <b> <tool> c\n<tool_call>{}</tool_call> <tool_ca"
    assert chunks[-1]["finish_reason"] == "stop"


async def test_nothing_is_read_unless_tools_may_be_called(tokenizers: dict[str, Tokenizer]) -> None:
    text = FORMATS["smollm2"].write(CALLS[1:])
    api = ChatServer(tokenizers["smollm2"])
    api.say(text)
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        for found in await api.answers(**body):
            assert found["message"]["content"] == text
            assert "tool_calls" not in found["message"]
            assert found["finish_reason"] == "stop"
    # The prompt is the same whether tools may be called or not, so its KV is found.
    prompts = [turn.tokens for turn in api.engine.turns]
    await api.answers(tools=TOOLS)
    assert api.engine.turns[-1].tokens == prompts[2] != prompts[0]
    assert (await api.http.post("/tokenize", json={"messages": HI, "tools": TOOLS})).json()["tokens"] == prompts[2]


async def test_a_call_that_is_cut_off(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    text = "Now.\n" + FORMATS["hermes"].write(CALLS)
    api.say(text)
    one, two = await api.answers(tools=TOOLS, max_tokens=len(api.tokenizer.encode(text)) - 12)
    assert one == two
    assert one["finish_reason"] == "length"
    assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["write"]
    assert one["message"]["content"].startswith('Now.<tool_call>\n{"name": "list')
    one, two = await api.answers(tools=TOOLS, max_tokens=30)
    assert one == two
    assert (one["finish_reason"], text.startswith(one["message"]["content"])) == ("length", True)
    assert "tool_calls" not in one["message"]


@pytest.mark.parametrize(("text", "stop"), [
    (FORMATS["hermes"].write(CALLS), "quoted"),
    ('<tool_call>\n{"name": "write", "arguments": {"path": oops}}\n</tool_call>', None),
    ('<tool_call>\n{"name": "write", "arguments": {"path": "a"}', None),
])  # fmt: skip
async def test_a_call_that_breaks_off_in_a_stream_is_not_to_be_run(
    tokenizers: dict[str, Tokenizer], text: str, stop: str | None
) -> None:
    api = ChatServer(tokenizers["hermes"])
    api.say(text)
    whole, streamed = await api.answers(tools=TOOLS, stop=stop)
    assert whole["finish_reason"] == streamed["finish_reason"] == "stop"
    assert "tool_calls" not in whole["message"]
    (call,) = streamed["message"]["tool_calls"]
    assert call["function"]["arguments"] in text
    responses = ResponsesServer(tokenizers["hermes"])
    responses.say(text)
    tools = [{"type": "function", **one["function"]} for one in TOOLS]
    item = (await responses.events(tools=tools, stop=stop))[-1]["response"]["output"][0]
    assert (item["status"] == "incomplete") == (not sound(item["arguments"]))


async def test_one_call_only(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    api.say(FORMATS["hermes"].write(CALLS * 2), pause=0.0005)
    for found in await api.answers(tools=TOOLS, parallel_tool_calls=False):
        assert len(found["message"]["tool_calls"]) == 1
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
    assert all(turn.cancelled.is_set() for turn in api.engine.turns)


@pytest.mark.parametrize("form", ["mistral", "mistral_args", "llama3_json"])
async def test_special_tokens_are_seen_by_formats_that_need_them(tokenizers: dict[str, Tokenizer], form: str) -> None:
    api = ChatServer(tokenizers[form])
    start = "<|python_tag|>" if form == "llama3_json" else ""
    api.say("Well. " + start + FORMATS[form].write(CALLS[1:]))
    one, two = await api.answers(tools=TOOLS)
    assert one == two
    assert (one["message"]["content"], one["message"]["tool_calls"]) == ("Well.", [called("list_all", "{}")])
    for found in await api.answers():
        assert not any(mark in found["message"]["content"] for mark in dialects.SPECIAL_MARKS[form])


async def test_calls_with_logprobs_token_ids_and_stops(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    text = "Go.\n" + FORMATS["hermes"].write(CALLS[1:])
    api.say(text)
    one, two = await api.answers(tools=TOOLS, logprobs=True, return_token_ids=True)
    assert one == two
    assert one["token_ids"] == [*api.tokenizer.encode(text), 319]
    assert len(one["logprobs"]["content"]) == len(one["token_ids"]) == one["usage"]["completion_tokens"]
    api.say(text + "\nSTOP here")
    one, two = await api.answers(tools=TOOLS, stop="STOP")
    assert one == two
    assert (one["finish_reason"], one["stop_reason"], one["message"]["content"]) == ("tool_calls", "STOP", "Go.")
    one, two = await api.answers(tools=TOOLS, stop="list_all")
    assert one == two
    assert one["message"]["content"] == 'Go.\n<tool_call>\n{"name": "'
    assert one["finish_reason"] == "stop"


async def test_each_choice_has_its_calls(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    api.say(FORMATS["hermes"].write(CALLS[1:]))
    choices = (await api.post(tools=TOOLS, n=3)).json()["choices"]
    calls = [choice["message"]["tool_calls"] for choice in choices]
    assert len({call["id"] for (call,) in calls}) == 3


async def test_what_reaches_the_engine(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    api.say("x")
    named = {"type": "function", "function": {"name": "list_all"}}
    for choice in ("auto", "required", named):
        await api.post(tools=TOOLS, tool_choice=choice)
    auto, required, one = (turn.params.grammar for turn in api.engine.turns)
    assert auto is None
    assert required is not None
    assert one is not None
    assert (required.kind, "write" in required.text, "write" in one.text) == ("lark", True, False)
    assert "){0," in required.text
    assert "){0," not in one.text
    await api.post(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    grammar = api.engine.turns[-1].params.grammar
    assert grammar is not None
    assert "){0," not in grammar.text
    await api.post(messages=conversation(1), tools=TOOLS)
    assert api.engine.turns[0].conversation == ""


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_that_cannot_be_forced(tokenizers: dict[str, Tokenizer], stream: bool) -> None:
    api = ChatServer(tokenizers["hermes"])
    api.say("x")
    tools = [tool(parameters={"type": "object", "properties": {"a": {"type": "robot"}}})]
    assert (await api.post(tools=tools)).status_code == 200
    response = await api.post(tools=tools, tool_choice="required", stream=stream)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("form", FORMS)
async def test_a_format_leaves_the_choice_of_a_call(tokenizers: dict[str, Tokenizer], form: str) -> None:
    """As with OpenAI: the model calls a tool, or answers in the format."""
    api = ChatServer(tokenizers[form])
    body = {
        "tools": TOOLS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
    }
    api.say(FORMATS[form].write(CALLS[1:]))
    for found in await api.answers(**body):
        assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
        assert found["message"]["tool_calls"] == [called("list_all", "{}")]
    # What is in the format is no call, whatever it resembles.
    for text in ('{"name": "Anna", "age": 3}', '{"name": "<tool_call><function=f></function></tool_call>", "age": 3}'):
        api.say(text)
        for found in await api.answers(**body):
            assert (found["finish_reason"], found["message"]["content"]) == ("stop", text)
            assert "tool_calls" not in found["message"]
    grammars = [turn.params.grammar for turn in api.engine.turns]
    assert all(grammar and grammar.kind == "lark" and "list_all" in grammar.text for grammar in grammars)
    await api.post(**body, tool_choice="none")
    await api.post(**body, tool_choice="required")
    none, required = (turn.params.grammar.text for turn in api.engine.turns[-2:])
    assert ("list_all" in none, '"age"' in none) == (False, True)
    assert ("list_all" in required, '"age"' in required) == (True, False)


async def test_who_is_at_fault_beside_a_format(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["hermes"])
    robot = [tool(parameters={"type": "object", "properties": {"a": {"type": "robot"}}})]
    for tools, regex, param in ((robot, "a", "tools"), (TOOLS, "(", "structured_outputs")):
        response = await api.post(tools=tools, structured_outputs={"regex": regex})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_the_flag(tokenizers: dict[str, Tokenizer]) -> None:
    api = ChatServer(tokenizers["smollm2"], tool_call_parser="mistral")
    api.say(FORMATS["mistral"].write(CALLS[1:]))
    for found in await api.answers(tools=TOOLS):
        assert found["message"]["tool_calls"] == [called("list_all", "{}")]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": 5}, "tools", "list"),
        ({"tools": [5]}, "tools[0]", "dictionary"),
        ({"tools": [{}]}, "tools[0]", "must look like"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "other kinds"),
        ({"tools": [tool(), {"type": "function", "function": "f"}]}, "tools[1]", "must look like"),
        ({"tools": [tool("")]}, "tools[0].function.name", "1 to 128"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name", "1 to 128"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "'a b'"),
        ({"tools": [tool(5)]}, "tools[0].function.name", "letters"),
        ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools[2].function.name", "Two tools are called 'a'"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description", "string"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "type object"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", "type object"),
        ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters.properties", "an object"),
        ({"tools": [tool(parameters={"required": [1]})]}, "tools[0].function.parameters.required", "strings"),
        ({"tools": [tool()] * 257}, "tools", "at most 256"),
        ({"tools": [tool(description="x" * 2**20)]}, "tools", "262144 characters"),
        (
            {"tools": [tool(), tool("g", parameters={"properties": {str(i): {} for i in range(99999)}})]},
            "tools",
            "JSON",
        ),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs `tools`"),
        ({"tool_choice": 5, "tools": [tool()]}, "tool_choice", "or an object"),
        ({"tool_choice": "any", "tools": [tool()]}, "tool_choice", "'auto'"),
        ({"tool_choice": tool("g"), "tools": [tool()]}, "tool_choice", "'g'"),
        ({"tool_choice": {"type": "function"}, "tools": [tool()]}, "tool_choice", "must be"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [tool()]}, "tool_choice", "must be"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0]", "must look like"),
        ({"messages": [{"role": "assistant", "tool_calls": [{**tool(), "id": 5}]}]}, "messages[0]", "`id`"),
        ({"chat_template_kwargs": {"frob": 1}}, "chat_template_kwargs", "enable_thinking, reasoning_effort, thinking"),
        ({"chat_template_kwargs": {"bos_token": 1}}, "chat_template_kwargs", "`bos_token`"),
    ],
)
async def test_bad_tools(tokenizers: dict[str, Tokenizer], body: dict[str, Any], param: str, words: str) -> None:
    api = ChatServer(tokenizers["hermes"])
    began = time.perf_counter()
    response = await api.post(**body)
    assert time.perf_counter() - began < 10  # half a second alone
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert not api.engine.turns


@pytest.mark.parametrize(
    "arguments", ["", "{", "[1]", '"x"', '{"a": "\\ud800"}', "[" * 5000, '{"a": ' * 500 + "1" + "}" * 500]
)
@pytest.mark.parametrize("form", FORMS)
async def test_odd_arguments_in_the_history(tokenizers: dict[str, Tokenizer], form: str, arguments: str) -> None:
    api = ChatServer(tokenizers[form])
    api.engine.max_model_len = 10**6
    api.say("x")
    call = {**tool(arguments=arguments), "id": "1"}
    response = await api.post(messages=[*HI, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert response.status_code in (200, 400), response.text
    if form == "hermes" and arguments:
        assert arguments in api.tokenizer.decode(api.engine.turns[0].tokens)
