"""Tool calls are read in every format, however the text comes."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.text.call_parsers import TAG_MARKS, ParsedCalls
from miniserve.text.formats import FORMATS
from miniserve.text.reader import CallScanner, MoreArguments, Part, ToolCall, merged
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
        "<function=w>\n<parameter=path>\na\n<parameter=text>\nhi\n</parameter>\n</function>",
        "<function=w>\n<parameter=path>\na\n<parameter=text>\nhi\n</parameter>",
        "<tool_call><function=w><parameter=path>a<parameter=text>hi</parameter></function></tool_call>",
        "<tool_call><function=w><parameter=path>a<function=list_all></function></parameter></function></tool_call>",
        "<tool_call><function=w><parameter=path>a</parameter></parameter></function></tool_call>",
        "<tool_call><function=w><parameter=path>a</parameter>b</function></tool_call>",
        "<tool_call><function=w></parameter></function></tool_call>",
        "<tool_call><function=w><function=list_all></function></tool_call>",
        "<tool_call><function=w><parameter=path>a</function></parameter></function></tool_call>",
        "<tool_call><function=w><parameter=path>a</tool_call> and so on",
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
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"name": 5, "arguments": "x"}', [("f", {"name": 5, "arguments": "x"})]),
    ],
)
def test_variants(form: str, text: str, calls: list[Any]) -> None:
    for pieces in ([text], list(text)):
        assert plain(read(form, pieces)) == calls


JSON_FORMS = [form for form in FORMS if form != "qwen3_coder"]


def early_parts(form: str, pieces: list[str], schemas: Any = SCHEMAS, single: bool = False) -> list[list[Part]]:
    """What each piece brings, and at last the end."""
    scanner = CallScanner(FORMATS[form], schemas, single, early=True)
    return [*(scanner.read(piece) for piece in pieces), scanner.read("", final=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", ["", "\nDone } ]"])
def test_early_calls_are_the_whole_ones(form: str, after: str) -> None:
    text = FORMATS[form].write(CALLS * 2) + after
    whole = read(form, [text])
    for pieces in (list(text), *([text[:cut], text[cut:]] for cut in range(len(text) + 1))):
        parts = [part for piece in early_parts(form, pieces) for part in piece]
        for before, part in itertools.pairwise(parts):
            if isinstance(part, MoreArguments):
                assert isinstance(before, ToolCall | MoreArguments)
                assert before.index == part.index
                assert part.text
        assert loose(merged(parts)) == loose(whole)
        assert [part.index for part in parts if isinstance(part, ToolCall)] == list(range(len(CALLS) * 2))


@pytest.mark.parametrize("form", JSON_FORMS)
def test_arguments_come_while_they_are_written(form: str) -> None:
    text = FORMATS[form].write([("write", {"text": "x" * 50, "count": 1.5})])
    start = text.index("x" * 50)
    seen = ""
    for at, parts in enumerate(early_parts(form, list(text))):
        seen += "".join(part.arguments if isinstance(part, ToolCall) else part.text for part in parts)
        if start <= at < start + 50:
            assert seen.endswith("x" * (at - start + 1)), "each as soon as it is there"
    assert json.loads(seen) == {"text": "x" * 50, "count": 1.5}
    assert sum(map(len, early_parts("qwen3_coder", list(FORMATS["qwen3_coder"].write(CALLS[:1]))))) == 1


@pytest.mark.parametrize(
    ("form", "text", "parts"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, x}}</tool_call>', ['{"a": 1, ', "x}}</tool_call>"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\nc"}}', ['{"a": "b', '\nc"}}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\\x", "c": 1}}', ['{"a": "b', '\\x", "c": 1}}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800", "c": 1}', ['{"a": "', '\\ud800", "c": 1}']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}', ['{"a": ', "1e999}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}', ['{"a": ', "01}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}', ['{"a": ', "NaN}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}', ['{"a": [1', "}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1,]}}', ['{"a": [1,', "]}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a" 1}}', ['{"a" ', "1}}"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call> x', ['{"a": 1}', "}}</tool_call> x"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}} x', ['{"a": 1}', "} x"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', ['{"a": "x']),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\\u00', ['{"a": "x', "\\u00"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 12', ['{"a": ', "12"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {', ["{"]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "arguments": {"a": 1}}</tool_call>',
         ["{}", ', "arguments": {"a": 1}}</tool_call>']),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ['{"a": 1}']),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ['{"a": 1}']),
        ("hermes", '<tool_call>{"function": {"name": "f", "arguments": {"a": 1}}}</tool_call>', ['{"a": 1}']),
        ("hermes", '<tool_call>{"name": "f", "more": {"arguments": {"b": 1}}, "arguments": { }}</tool_call>', ["{ }"]),
        ("hermes", '<tool_call>{"more": {"name": "g"}, "arguments": {"a": 1}}</tool_call>',
         ['<tool_call>{"more": {"name": "g"}, "arguments": {"a": 1}}</tool_call>']),
        ("smollm2", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": ]',
         ['{"a": 1}', '{"b": ', "]"]),
        ("smollm2", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, 5]</tool_call>',
         ['{"a": 1}', "}, 5]</tool_call>"]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', ['{"a": 1}']),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": {"b": 1}} text', ['{"a": {"b": 1}}', "text"]),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": oh', ['{"a": ', "oh"]),
        ("llama3_json", '{"name": "write", "parameters": {"a": 1', ['{"a": ', "1"]),
        ("llama3_json", '{"name": "none", "parameters": {"a": 1', ['{"name": "none", "parameters": {"a": 1']),
        ("llama3_json", '<|python_tag|>{"name": "none", "parameters": {"a": 1', ['{"a": ', "1"]),
        ("llama3_json", '{"name": "none", "parameters": {"a": 1}}', ['{"a": 1}']),
    ],
)  # fmt: skip
def test_early_calls_end_where_they_break(form: str, text: str, parts: list[str]) -> None:
    """No more is given out than certainly begins JSON; the rest is content."""
    for pieces in ([text], list(text), [text[: len(text) // 2], text[len(text) // 2 :]]):
        found = read(form, pieces, early=True)
        assert [part.arguments if isinstance(part, ToolCall) else part for part in found] == parts


@pytest.mark.parametrize("form", JSON_FORMS)
@given(data=st.data())
def test_no_invalid_json_is_given_early(form: str, data: st.DataObject) -> None:
    arguments = json.dumps({"a": [1.5, "x\u00e9\U0001f600\n", {}, [], None, True], "b": {"c": -2}})
    text = FORMATS[form].write([("write", {})]).replace("{}", arguments)
    junk = data.draw(st.sampled_from([*'{}[],:"\\x1.e- \n', "\\u", "null", ""]))
    at = data.draw(st.integers(text.index(arguments), len(text)))
    text = text[:at] + junk + text[at + data.draw(st.integers(0, 2)) :]
    for part in check_reading(form, text, pieces_of(text, data), early=True):
        if isinstance(part, ToolCall):
            assert begins_json(part.arguments), part.arguments


def begins_json(text: str) -> bool:
    """Whether some way to go on makes it valid: that of closing what is open, with a value where one is missing."""
    closing, quoted, escaped = "", False, False
    for character in text:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "{[":
            closing = {"{": "}", "[": "]"}[character] + closing
        elif character in "}]":
            closing = closing[1:]
    for more in ("", '"', '":1', ":1", "1", '"":1', "1}"):
        with contextlib.suppress(ValueError):
            msgspec.json.decode(text + more + closing)
            return True
    return False


def test_single_early_calls() -> None:
    text = FORMATS["smollm2"].write(CALLS)
    scanner = CallScanner(FORMATS["smollm2"], SCHEMAS, True, early=True)
    parts = []
    for character in text:
        assert not scanner.done
        parts += scanner.read(character)
    assert scanner.done
    assert plain(merged(parts)) == CALLS[:1]


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
    *("<tool", "é", "日本", "text", "f", '{"name": "f", "parameters": {"a": "}"}}', ', "arguments": {"a": "', "1e9"),
    *("<function=f>\n<parameter=a>\n", "\n</parameter>\n</function>\n", "\\u00e9", "\\ud83d", "\x01", ", ", ": "),
]


def pieces_of(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def check_reading(form: str, text: str, pieces: list[str], early: bool) -> list[Part]:
    """All of `text` is given out, the same however it comes, and no argument has swallowed a mark."""
    parts = read(form, pieces, early=early)
    assert loose(parts) == loose(read(form, [text], early=early)) == loose(read(form, list(text), early=early))
    recording = Recording(FORMATS[form], SCHEMAS, False, early=early)
    given_out = merged(recording.read(text) + recording.read("", final=True))
    assert loose(given_out) == loose(parts)
    assert re.sub(r"[\s;]", "", recording.seen) == re.sub(r"[\s;]", "", text)
    if not any(isinstance(part, ToolCall) for part in parts):
        assert "".join(part for part in parts if isinstance(part, str)) == text
    for part in parts:
        if isinstance(part, ToolCall) and form == "qwen3_coder" and "<function=" in text and not early:
            swallowed = [value for value in json.loads(part.arguments).values() if isinstance(value, str)]
            assert "{" in text or not any(mark in value for mark in TAG_MARKS for value in swallowed)
    return parts


def loose(parts: list[Part]) -> list[Any]:
    """Without ids; arguments may end anywhere."""
    return [(part.name, part.arguments) if isinstance(part, ToolCall) else part for part in parts]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_no_character_is_lost(form: str, early: bool, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=25)))
    check_reading(form, text, pieces_of(text, data), early)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_spoiled_calls_lose_nothing(form: str, early: bool, data: st.DataObject) -> None:
    """Calls with something cut out, doubled, swapped or put inside."""
    text = FORMATS[form].write([("write", {"text": "a\n", "count": 1}), ("list_all", {}), ("write", {"text": ""})])
    marks = ["<tool_call>", "</tool_call>", *TAG_MARKS, "[TOOL_CALLS]", "[ARGS]", '"', "{", "}", "\\", "\n", ""]
    for _ in range(data.draw(st.integers(1, 3))):
        a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 3)))
        kept, one, two, rest = text[:a], text[a:b], text[b:c], text[c:]
        text = (
            kept + data.draw(st.sampled_from([two, one * 2 + two, two + one, *(one + m + two for m in marks)])) + rest
        )
    check_reading(form, text, pieces_of(text, data), early)


@pytest.mark.parametrize("mark", ["", *TAG_MARKS, "<tool_call>", "</tool_call>"])
def test_a_mark_anywhere_in_a_call(mark: str) -> None:
    """Put in, and put in the place of what stands there, at each character."""
    text = FORMATS["qwen3_coder"].write([("write", {"text": "a\nb", "count": 1})])
    for at in range(len(text)):
        for rest in (at, at + 1, at + len(mark), at + 14):
            spoiled = text[:at] + mark + text[rest:]
            check_reading("qwen3_coder", spoiled, [spoiled[:at], spoiled[at:]], early=False)


class Recording(CallScanner):
    """Notes what calls were made of, and what was given out, in order."""

    seen = ""

    def _settle(self, found: ParsedCalls, parts: list[Part]) -> None:
        held, begun = self._held, self._given[-1:]
        before = self.seen
        super()._settle(found, parts)
        if self.seen == before:  # a call, or the end of one
            self.seen += held[: found.end]
        elif begun:
            self.seen = before + held[: begun[0].end] + self.seen[len(before) :]

    def _give(self, text: str, parts: list[Part]) -> None:
        self.seen += text
        super()._give(text, parts)


LONG = {
    "text": 'x = {"a": [1]}\n' * 4000,
    "words": ["a", 1.5, None, {}] * 4000,
    "digits": "9" * 60_000,
    "blank": " " * 60_000,
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "mistral_args"])
@pytest.mark.parametrize("key", LONG)
def test_long_calls_take_no_longer_for_coming_in_pieces(form: str, key: str, early: bool) -> None:
    text = FORMATS[form].write([("write", {key: LONG[key]})])
    if key in ("digits", "blank") and form != "qwen3_coder":
        text = text.replace(f'"{LONG[key]}"', f"{LONG[key]}1")
    pieces = list(text) if form == "hermes" else [text[i : i + 4] for i in range(0, len(text), 4)]
    began = time.process_time()
    parts = read(form, pieces, early=early)
    assert len(parts) <= 2
    assert time.process_time() - began < 5  # each time from the beginning would take minutes


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
