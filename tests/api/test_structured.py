"""Structured output: each way to ask for a format reaches the engine as a grammar; what is wrong is said at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from miniserve.api import structured
from miniserve.api.fields import ignored_header
from miniserve.api.openai.chat import ChatRenderer
from miniserve.api.openai.schemas import ChatRequest, CompletionRequest
from miniserve.api.structured import requested
from miniserve.sampling_params import Grammar, SamplingParams
from miniserve.text import grammar
from miniserve.text.dialect import find_dialect
from miniserve.text.grammar import Compiler, GrammarError
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, Api, error_of, make_app
from tests.support.fake_engine import EOS, FakeClient, spell
from tests.support.schemas import PERSON, nested


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer)


def fits(compiler: Compiler, tokenizer: Tokenizer, wanted: Grammar, text: str) -> bool:
    matcher = compiler.compile(wanted)
    return matcher.consume_tokens(tokenizer.encode(text)) and matcher.is_accepting()


GOOD_REQUESTS = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1, 2],\n  "b": {}}', "[1]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
     '{"name": "Anna", "age": 3, "tags": ["a", "b"]}', '{"name": "Anna"}'),
    ({"structured_outputs": {"json": {"type": "integer"}}}, "12", "x"),
    ({"structured_outputs": {"json": '{"type": "integer"}'}}, "12", "x"),
    ({"structured_outputs": {"json": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}}, "12", "x"),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "a+/b"}}, "aa/b", "ba"),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "maybe"),
    ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, "bba", "bbc"),
    ({"structured_outputs": {"grammar": 'start: "a" X\nX: /[0-9]+/'}}, "a12", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "good", "bad"), GOOD_REQUESTS, ids=str)
async def test_formats_reach_the_engine(api, compiler, tokenizer, body, good, bad):
    for answer in (await api.chat(**body), await api.complete(**body)):
        assert answer.status_code == 200, answer.text
    for turn in api.engine.turns:
        assert fits(compiler, tokenizer, turn.params.grammar, good)
        assert not fits(compiler, tokenizer, turn.params.grammar, bad)


@pytest.mark.parametrize("blank", ["\n", "\n ", "\r\n", " \t"])
def test_empty_lines_take_no_time(blank):
    """It runs in a thread, but Python's searches let no other one run."""
    for text in ('root ::= "a"', 'start: "a"'):
        for spaced in (text + "\n" + blank * 8000, blank * 5000 + "\n" + text):
            request = CompletionRequest(prompt="Hi", structured_outputs={"grammar": spaced})
            started = time.process_time()
            found = requested(request, set())
            assert time.process_time() - started < 0.2
            assert 'start: "a"' in found.text


async def test_text_is_no_format(api):
    assert (await api.chat(response_format={"type": "text"})).status_code == 200
    assert api.engine.turns[0].params.grammar is None


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}}


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"regex": "[a&&b]"}}, "structured_outputs", "cannot be followed"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs", "at most 4096"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "nothing"),
        ({"structured_outputs": {"grammar": "@@@"}}, "structured_outputs", ""),
        ({"structured_outputs": {"grammar": "a" * 20000}}, "structured_outputs.grammar", "at most 16384"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "EOF"),
        ({"structured_outputs": {"json": "[" * 100000}}, "structured_outputs.json", "recursion"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs.json", "dictionary"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regex": "a"}, **schema_format({})}, "structured_outputs", "both"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
        (schema_format({"type": "nothing"}), "response_format", "nothing"),
        (schema_format({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, strict=True), "response_format", "oneOf"),
        (schema_format({"properties": {"a": {"if": {}, "then": {}}}}, strict=True), "response_format", "if"),
        (schema_format({"$ref": "http://169.254.169.254/"}), "response_format", "169.254"),
        (schema_format({"properties": {f"p{i}": {} for i in range(2000)}}), "response_format", "2000 properties"),
        (schema_format(nested(90)), "response_format", "levels deep"),
        (schema_format({"enum": ["x" * 70000]}), "response_format", "at most 65536"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_wrong_is_named(api, body, param, part):
    for answer in (await api.chat(**body), await api.complete(**body)):
        error = error_of(answer, 400)
        assert error["param"] == param, error
        assert part in error["message"]
        assert len(error["message"]) < 800
    assert not api.engine.turns


def test_what_a_format_is_not_held_to_is_told(compiler, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}, "required": None}
    body = schema_format({**schema, "dependentRequired": {"a": ["b"]}})
    relaxed: set[str] = set()
    wanted = requested(CompletionRequest(prompt="Hi", **body), relaxed)
    assert relaxed == {"response_format.schema.not", "response_format.schema.dependentRequired"}
    assert fits(compiler, tokenizer, wanted, '{"a": 1}')
    assert not fits(compiler, tokenizer, wanted, '{"a": "x"}')
    relaxed.clear()
    requested(CompletionRequest(prompt="Hi", structured_outputs={"json": schema}), relaxed)
    assert relaxed == {"structured_outputs.json.not"}
    relaxed.clear()
    with pytest.raises(GrammarError, match="not"):
        compiler.compile(requested(CompletionRequest(prompt="Hi", **schema_format(schema, strict=True)), relaxed))
    assert not relaxed


async def test_what_is_not_held_to_is_in_the_header(api):
    body = schema_format({"type": "object", "not": {"required": ["a"]}})
    assert (await api.chat(**body)).headers["X-Ignored-Parameters"] == "response_format.schema.not"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {"required": ["a"]}}}}
    answer = await api.chat(tools=[tool], tool_choice="required")
    assert answer.headers["X-Ignored-Parameters"] == "tools.parameters.not"


def test_what_tools_are_not_held_to_is_told(tokenizer):
    parameters = {"properties": {"a": {"type": "string", "pattern": "(?=a)"}}, "required": ["a", "gone"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    request = ChatRequest.model_validate({"messages": HI, "tools": tools, "tool_choice": "required"})
    renderer = ChatRenderer(tokenizer, find_dialect(tokenizer), request)
    renderer.params(SamplingParams(), [1])
    assert sorted(renderer.relaxed) == ["tools.parameters.pattern", "tools.parameters.required"]
    assert set(ignored_header(renderer.relaxed).values()) == {"tools.parameters.pattern, tools.parameters.required"}


async def test_a_slow_compilation_stops_neither_the_loop_nor_others(tokenizer, monkeypatch):
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    api = Api(make_app(tokenizer, engine), engine)
    assert (await api.chat(structured_outputs={"regex": "warm"})).status_code == 200
    monkeypatch.setitem(grammar.BOUNDS, "multiple", 10**9)
    monkeypatch.setattr(structured, "SECONDS", 0.1)
    worst, last = 0.0, time.perf_counter()

    async def beat() -> None:
        nonlocal worst, last
        while True:
            await asyncio.sleep(0.001)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()

    beating = asyncio.create_task(beat())
    slow = [schema_format({"type": "integer", "multipleOf": k}) for k in (500009, 500029, 500041, 500057)]
    answers = await asyncio.gather(*(api.chat(**body) for body in slow))
    beating.cancel()
    refused = {(a.status_code, a.json()["error"]["code"]) for a in answers if a.status_code != 200}
    assert (400, None) in refused, "two are being compiled"
    assert (503, "queue_full") in refused, "the others have not begun"
    assert worst < 0.3, "the loop goes on"


async def test_a_grammar_that_fails_later_is_the_requests_fault(tokenizer):
    engine = FakeClient(steps=[*spell("{"), []], finish="error", error="The grammar is too complex.", invalid=True)
    api = Api(make_app(tokenizer, engine), engine)
    assert "too complex" in error_of(await api.chat(), 400)["message"]
    lines = (await api.chat(stream=True)).text.split("\n\n")
    assert any("too complex" in line and "invalid_request_error" in line for line in lines)
