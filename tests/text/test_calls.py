"""Tool calls are read in every format, however the text comes."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.text.call_parsers import ParsedCalls
from miniserve.text.formats import FORMATS
from miniserve.text.reader import CallScanner, Part, ToolCall, merged
from miniserve.text.schemas import typed
from tests.support.dialects import CALLS, FORMS, SCHEMAS, plain, read


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("calls", [CALLS[:1], CALLS[1:], CALLS, CALLS * 2])
@pytest.mark.parametrize("before", ["", "I look.\n\n", "{ "])
@pytest.mark.parametrize("after", ["", "\nDone } ]"])
def test_calls_at_every_cut(form: str, calls: list[tuple[str, Any]], before: str, after: str) -> None:
    if form == "llama3_json" and before:
        before += "<|python_tag|>"
    text = before + FORMATS[form].write(calls) + after
    parts = read(form, [text])
    said = before.removesuffix("<|python_tag|>").rstrip()
    assert plain(parts) == [*[said][: bool(said)], *calls, *[after.strip()][: bool(after)]]
    found = [part for part in parts if isinstance(part, ToolCall)]
    assert [call.index for call in found] == list(range(len(calls)))
    assert len({call.id for call in found}) == len(calls)
    assert all(call.id.startswith("call_") for call in found)
    for cut in range(len(text)):
        assert plain(read(form, [text[:cut], text[cut:]])) == plain(parts)
    assert plain(read(form, list(text))) == plain(parts)
    if len(calls) > 1:
        assert plain(read(form, [text], single=True)) == [*[said][: bool(said)], calls[0]]


@pytest.mark.parametrize("form", FORMS)
def test_cut_off_calls_are_text(form: str) -> None:
    """However far a call has come: it is a call, or all of it is text."""
    text = FORMATS[form].write(CALLS[:1])
    complete = [length for length in range(len(text) + 1) if plain(read(form, [text[:length]])) == CALLS[:1]]
    # JSON is complete before the mark that closes it.
    assert complete == list(range(complete[0], len(text) + 1))
    assert len(text) - complete[0] <= len("\n</tool_call>")
    for length in range(complete[0]):
        assert read(form, list(text[:length])) == [text[:length]][: bool(length)]


MALFORMED = {
    "hermes": [
        '<tool_call>\n{"name": "write", "arguments": {"text": "x"}\n</tool_call>',
        '<tool_call>{"name": "write", "arguments": {"text": "x"}}}</tool_call>',
        '<tool_call>{"name": "write", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "write", "arguments": "no"}</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>{'name': 'write'}</tool_call>",
        '<tool_call>{"name": "write", "arguments": {"n": NaN}}</tool_call>',
        '<tool_call>{"name": "write", "arguments": {"n": 1e999}}</tool_call>',
        '<tool_call>{"name": "write", "arguments": {"n": "\\ud800"}}</tool_call>',
        f'<tool_call>{{"name": "write", "arguments": {{"n": {"[" * 5000}{"]" * 5000}}}}}</tool_call>',
        '<tool_call>{"name": "write"} {"name": "write"}</tool_call>',
        '<tool_call>[{"name": "write"}, 5]</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>write(5)</tool_call>",
        "<tool_call></tool_call>",
        "a <tool_cal <tool_call",
        '<tool_call>{"name": "write", "arguments": {"text": "x',
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=write>\n<parameter=text>\nx\n</function>\n</tool_call>",
        "<tool_call>\n<function=write>\nx\n</function>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=write>\n<parameter=text>\nx\n</parameter>\n</function>\n and so on",
        "<function=write>",
    ],
    "llama3_json": [
        '{"city": "Paris"}',
        '{"name": "Paris"',
        '{"name": "Paris", "age": 2000}',
        "<|python_tag|>print(1)",
        '{"names": 1}',
        "{}",
        "{",
        "[1]",
    ],
    "mistral": [
        "[TOOL_CALLS] none",
        '[TOOL_CALLS] [{"name": "write", "arguments": }]',
        '[TOOL_CALLS]write[ARGS]{"text": }',
        "[TOOL_CALLS]write[ARGS][1]",
        "[TOOL_CALLS]",
    ],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in MALFORMED.items() for text in texts])
def test_malformed_calls_are_text(form: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert read(form, pieces) == [text]
    following = text + "\n" + FORMATS[form].write(CALLS[1:])
    if form in ("hermes", "qwen3_coder") and text.endswith("</tool_call>"):
        assert plain(read(form, list(following))) == [text, CALLS[1]]


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {}}}', [("f", {})]),
        ("hermes", "<tool_call><function=list_all></function></tool_call>", [("list_all", {})]),
        (
            "qwen3_coder",
            "<function=write><parameter=text>a\n\nb</parameter></function>",
            [("write", {"text": "a\n\nb"})],
        ),
        ("qwen3_coder", "<function=list_all>\n</function>\n</tool_call>", [("list_all", {})]),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        (
            "llama3_json",
            ' \n{"function": "write", "parameters": {}} ; {"name": "list_all"}',
            [("write", {}), ("list_all", {})],
        ),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ("llama3_json", '<|python_tag|>{"name": "f"}', [("f", {})]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"a": 1}[TOOL_CALLS]g{}', [("f", {"a": 1}), ("g", {})]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "123456789"}]', [("f", {})]),
    ],
)
def test_variants(form: str, text: str, calls: list[Any]) -> None:
    for pieces in ([text], list(text)):
        assert plain(read(form, pieces)) == calls


def test_arguments_are_as_the_model_wrote_them() -> None:
    text = '{"n": 1.10, "big": 123456789012345678901234567890,  "é": "\\u00e9"}'
    (call,) = read("hermes", [f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'])
    assert isinstance(call, ToolCall)
    assert call.arguments == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", {}, "5"),
        ("5", None, "5"),
        ("5", {"type": 7, "anyOf": 7, "oneOf": [7], "enum": 7}, "5"),
        ("five", {"type": "integer"}, "five"),
        ("True", {"type": "boolean"}, True),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("[1]", {"anyOf": [{"type": "array"}, {"type": "null"}]}, [1]),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("NaN", {"type": "number"}, "NaN"),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("9" * 9999, {"type": "integer"}, "9" * 9999),
    ],
)
def test_unquoted_arguments_are_what_their_schema_says(text: str, schema: Any, value: Any) -> None:
    assert typed(text, schema) == value


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ('{"x": 1}', {"$ref": "#/$defs/point"}, {"x": 1}),
        ('{"x": 1}', {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}], "default": None}, {"x": 1}),
        ("null", {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, None),
        ("[1]", {"allOf": [{"$ref": "#/$defs/list"}], "description": "Some."}, [1]),
        ("1", {"$ref": "#/$defs/word"}, "1"),
        ("1", {"$ref": "#/$defs/none"}, "1"),
        ("1", {"$ref": "#/$defs/endless"}, "1"),
        ("1", {"$ref": "elsewhere.json"}, "1"),
    ],
)
def test_references_are_followed(text: str, schema: Any, value: Any) -> None:
    """As pydantic writes schemas."""
    definitions = {
        "point": {"type": "object"},
        "list": {"type": "array"},
        "word": {"enum": ["1", "2"]},
        "endless": {"$ref": "#/$defs/endless"},
    }
    root = {"type": "object", "properties": {"p": schema}, "$defs": definitions}
    assert typed(text, schema, root) == value
    text = f"<tool_call>\n<function=f>\n<parameter=p>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = CallScanner(FORMATS["qwen3_coder"], {"f": root}, False).read(text, final=True)
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"p": value}


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "\n", "  ", "; "),
    *("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f"', ', "arguments": {}}', "{", "}", "[", "]", '"', "\\"),
    *("<tool", "é", "日本", "text", "f", '{"name": "f", "parameters": {"a": "}"}}'),
]


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_no_character_is_lost(form: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=25)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = read(form, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    assert plain(parts) == plain(read(form, [text]))
    recording = Recording(FORMATS[form], SCHEMAS, False)
    given_out = recording.read(text) + recording.read("", final=True)
    assert plain(merged(given_out)) == plain(parts)
    assert re.sub(r"[\s;]", "", recording.seen) == re.sub(r"[\s;]", "", text)
    content = "".join(part for part in parts if isinstance(part, str))
    if not any(isinstance(part, ToolCall) for part in parts):
        assert content == text


class Recording(CallScanner):
    """Notes what calls were made of, and what was given out, in order."""

    seen = ""

    def _settle(self, found: ParsedCalls, parts: list[Part]) -> None:
        self.seen += self._held[: found.end] if found.calls else ""
        super()._settle(found, parts)

    def _give(self, text: str, parts: list[Part]) -> None:
        self.seen += text
        super()._give(text, parts)


def test_long_calls_take_no_longer_for_coming_in_pieces() -> None:
    text = FORMATS["hermes"].write([("write", {"text": 'x = {"a": [1]}\n' * 4000})])
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    began = time.perf_counter()
    (call,) = read("hermes", pieces)
    assert isinstance(call, ToolCall)
    assert time.perf_counter() - began < 5  # each time from the beginning would take minutes


def test_the_library_reads_the_same() -> None:
    """transformers' own parser of responses, where its pitfalls do not matter (docs/decisions.md)."""
    from transformers.utils.chat_parsing import parse_response

    template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"content": "text"},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }
    for text in (
        "I look.\n" + FORMATS["hermes"].write([("write", {"text": "a\n{é", "count": 1})]),
        FORMATS["hermes"].write([("write", {"text": "a"}), ("list_all", {})]),
        "I look.",
    ):
        message = parse_response(text, template, prefix="")
        functions = [call["function"] for call in message.get("tool_calls", [])]
        theirs = [(function["name"], function["arguments"]) for function in functions]
        assert [*([message["content"]] if "content" in message else []), *theirs] == plain(read("hermes", [text]))
