"""The grammar of a whole answer: forced calls, a format or calls, and reasoning before both."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.api.tools import MAX_TOOLS, MAX_TOOLS_CHARS, check_tools, few_tools
from miniserve.sampling_params import Grammar
from miniserve.text.answer_grammar import _without, answer_grammar
from miniserve.text.formats import FORMATS, REASONING_MARKS
from miniserve.text.grammar import Compiler, json_grammar
from miniserve.text.tokenizer import Tokenizer
from tests.support.dialects import CALLS, FORMS, PERSON, TOOLS, plain, read, tool


def matches(tokenizer: Tokenizer, form: str, text: str, **how: Any) -> bool:
    options = {"single": False, "thinking": None, "opened": False, "relaxed": set(), **how}
    tools = options.pop("tools", TOOLS)
    grammar = answer_grammar(FORMATS[form], tools, options.pop("wanted", None), tokenizer=tokenizer, **options)
    matcher = Compiler(tokenizer).compile(grammar)
    tokens = tokenizer.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("form", FORMS)
def test_forced_calls(tokenizers: dict[str, Tokenizer], form: str) -> None:
    tokenizer, write = tokenizers[form], FORMATS[form].write
    nasty = {"text": 'a "b" }{ \n é', "count": -3}
    for call in (("write", nasty), ("write", {"text": ""}), ("list_all", {})):
        assert matches(tokenizer, form, write([call]))
        assert matches(tokenizer, form, write([call]), single=True)
    several = write([("write", nasty), ("list_all", {}), ("list_all", {})])
    assert matches(tokenizer, form, several) == FORMATS[form].parallel
    assert not matches(tokenizer, form, several, single=True)
    for wrong in (
        write([("unknown", {})]),
        write([("list_all", {"text": "x"})]),
        write([("write", {"text": "x", "more": 1})]),
        write([("write", {"text": "x", "count": "many"})]),
        write([("write", {"count": 1})]),
        "Well. " + write([("list_all", {})]),
        write([("list_all", {})]) + " Well.",
        "",
    ):
        assert not matches(tokenizer, form, wrong), wrong
    assert not matches(tokenizer, form, write([("list_all", {})]), tools=TOOLS[:1])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "list_all", "arguments": {}}]'),
        ("mistral", '[TOOL_CALLS] [{"name": "list_all", "arguments": {}, "id": "aB3456789"}]'),
        ("mistral_args", "[TOOL_CALLS]list_all[CALL_ID]aB3456789[ARGS]{}"),
    ],
)
def test_variants_of_forced_calls(tokenizers: dict[str, Tokenizer], form: str, text: str) -> None:
    """What models of the family write beside what they write here."""
    assert matches(tokenizers[form], form, text)
    assert plain(read(form, [text])) == CALLS[1:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["string", "integer"])
def test_as_many_tools_as_there_may_be_can_be_forced(tokenizers: dict[str, Tokenizer], form: str, kind: str) -> None:
    names = [f"argument_{i}" for i in range(10)]
    parameters = {"type": "object", "properties": {name: {"type": kind} for name in names}, "required": names[:1]}
    tools = [tool(f"tool_{i}", description="It does something." * 10, parameters=parameters) for i in range(MAX_TOOLS)]
    tools = tools[: MAX_TOOLS_CHARS // len(json.dumps(tools[0]))]
    check_tools(few_tools(tools))
    value = {"string": "5", "integer": 5}[kind]
    assert matches(tokenizers[form], form, FORMATS[form].write([("tool_7", {"argument_0": value})]), tools=tools)


@pytest.mark.parametrize("form", FORMS)
def test_schemas_of_forced_calls(tokenizers: dict[str, Tokenizer], form: str) -> None:
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    parameters = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/point"}, "kind": {"enum": ["a\nb", "c"]}},
        "required": ["p", "kind"],
        "$defs": {"point": point},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    def ok(arguments: Any) -> bool:
        return matches(tokenizers[form], form, FORMATS[form].write([("f", arguments)]), tools=tools)

    assert ok({"p": {"x": 1}, "kind": "a\nb"})
    assert not ok({"p": {"x": 1}, "kind": "d"})
    assert not ok({"p": {"x": "1"}, "kind": "c"})


@pytest.mark.parametrize("form", ["hermes", "smollm2"])  # with tokens for the marks, and without
def test_forced_calls_after_reasoning(tokenizers: dict[str, Tokenizer], form: str) -> None:
    tokenizer, call = tokenizers[form], FORMATS[form].write([("list_all", {})])
    how = {"thinking": REASONING_MARKS["qwen3"]}
    for text, opened, right in (
        (call, False, True),
        (f"<think>\nHm <b>\n</think>\n\n{call}", False, True),
        (f"Hm\n</think>\n\n{call}", False, False),
        (f"Hm\n</think>\n\n{call}", True, True),
        (f"<think>Hm</think>{call}", True, True),
        (call, True, False),
    ):
        assert matches(tokenizer, form, text, opened=opened, **how) == right, text


# --- calls beside a format ------------------------------------------------------------------------------------------

WANTED = [
    (json_grammar(PERSON), ['{"name": "Anna", "age": 3}', '{\n  "name": "Wri}te",\n  "age": 3\n}'], ["{}", "Anna"]),
    (json_grammar({"type": "array", "items": {"type": "integer"}}), ["[1, 2]", "[]"], ["[", "1"]),
    (Grammar("regex", r"a+/[b/]\/\\(?:\n|x)?"), ["aa/b/\\", "a///\\\n"], ["aa", "b"]),
    (Grammar("regex", ""), [""], ["a"]),
    (Grammar("lark", '%llguidance {}\n\nstart: "a" | "b" start // as of GBNF'), ["a", "bba"], ["b"]),
    (Grammar("lark", 'start: "}" | "b" x\nx: /[0-9]+/ | %json {"type": "null"}'), ["}", "b12", "bnull"], ["b"]),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(WANTED)))
def test_a_format_or_calls(tokenizers: dict[str, Tokenizer], form: str, number: int) -> None:
    tokenizer, write = tokenizers[form], FORMATS[form].write
    wanted, right, wrong = WANTED[number]
    both = [*CALLS[1:], ("write", {"text": "x", "count": 2})]
    for single in (False, True):
        for text in (*right, *(write([call]) for call in both)):
            assert matches(tokenizer, form, text, wanted=wanted, single=single), text
        for text in (*wrong, "I look.", (right[-1] or "x") + write(CALLS[1:]), write([("unknown", {})])):
            assert not matches(tokenizer, form, text, wanted=wanted, single=single), text
        several = write(both)
        assert matches(tokenizer, form, several, wanted=wanted, single=single) == (
            FORMATS[form].parallel and not single
        )


@pytest.mark.parametrize("mark", ["</think>", "[/THINK]"])
@given(data=st.data())
def test_text_without_a_mark(mark: str, data: st.DataObject) -> None:
    """Reasoning in a grammar never spells its end out: that would be the end for its reader."""
    letters = st.sampled_from([*mark, mark, mark[:-1], mark[:3], "a", "\n", "é"])
    text = "".join(data.draw(st.lists(letters, max_size=12)))
    assert (re.fullmatch(_without(mark), text) is not None) == (mark not in text)


def test_reasoning_does_not_spell_its_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, end = tokenizers["hermes"], tokenizers["hermes"].control_id("</think>")
    options: Any = {"single": False, "thinking": REASONING_MARKS["qwen3"], "opened": True, "tokenizer": tokenizer}
    options["relaxed"] = set()
    grammar = answer_grammar(FORMATS["hermes"], [], Grammar("regex", "[ab]"), **options)
    assert end is not None
    spelled = [*b"<</think>"]
    for tokens, right in (([*b"x </thin", end, ord("a")], True), ([*spelled, ord("a"), end, ord("a")], False)):
        matcher = Compiler(tokenizer).compile(grammar)
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == right


@pytest.mark.parametrize("number", range(len(WANTED)))
@pytest.mark.parametrize("form", ["hermes", "smollm2"])  # with tokens for the marks, and without
def test_a_format_after_reasoning(tokenizers: dict[str, Tokenizer], form: str, number: int) -> None:
    wanted, right, wrong = WANTED[number]

    def ok(text: str, opened: bool = False, tools: Any = ()) -> bool:
        how = {"thinking": REASONING_MARKS["qwen3"], "opened": opened, "tools": [*tools], "wanted": wanted}
        return matches(tokenizers[form], form, text, **how)

    for text in right:
        assert ok(text)
        assert ok(f"<think>\nHm <b> {{\n</think>\n\n{text}")
        assert ok(f"Hm\n</think>\n\n{text}", opened=True)
        assert ok(f"<think>Hm</think>{text}", opened=True, tools=TOOLS)
        assert not ok(text, opened=True)
        assert not ok(f"Hm\n</think>\n\n{text}")
    for text in wrong:
        assert not ok(f"<think>Hm</think>{text}")
    assert ok("<think>\nHm\n</think>\n\n" + FORMATS[form].write(CALLS[1:]), tools=TOOLS)
