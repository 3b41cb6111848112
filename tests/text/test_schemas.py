"""JSON schemas are read the same way by whoever needs them: values written as text, and grammars of forced calls."""

from __future__ import annotations

import contextlib
import json
import random
import re
from contextlib import suppress
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from miniserve.sampling_params import ParameterError
from miniserve.text.answer_grammar import answer_grammar
from miniserve.text.call_parsers import TAG_MARKS
from miniserve.text.formats import FORMATS
from miniserve.text.grammar import Compiler, GrammarError, json_grammar
from miniserve.text.reader import CallScanner, ToolCall
from miniserve.text.schemas import _KEPT, UNHELD, argument, held, spelled, typed
from miniserve.text.tokenizer import Tokenizer
from tests.support.dialects import FORMS, tool

# --- values written as text -----------------------------------------------------------------------------------------

ROOT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "odd/~ %": {"type": "boolean"}, "same": {"$ref": "#/properties/x"}},
    "$defs": {
        "number": {"enum": [1, 2.5]},
        "a/b~c%d": {"type": "integer"},
        "chain": {"$ref": "#/$defs/link"},
        "link": {"$ref": "#/$defs/number"},
        "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "integer"}]},
        "list": [{"type": "string"}, {"type": "integer"}],
    },
}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("1", {"enum": [1, 2]}, 1),
        ("1", {"enum": ["1", 2]}, "1"),
        ("2", {"enum": ["1", 2]}, 2),
        ("a", {"enum": ["a", 2]}, "a"),
        ("null", {"enum": ["a", None]}, None),
        ("true", {"enum": [True, "b"]}, True),
        ('{"a": [1]}', {"enum": [{"a": [1]}]}, {"a": [1]}),
        ("3", {"const": 3}, 3),
        ("3", {"const": "3"}, "3"),
        ("null", {"const": None}, None),
        ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, 5),
        ("5.5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5.5"),
        ("x", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "x"),
        ("3", {"anyOf": [{"type": "string"}, {"enum": [1, 2]}]}, "3"),
        ("2", {"anyOf": [{"type": "string"}, {"enum": [1, 2]}]}, 2),
        ("5", {"allOf": [{"type": ["integer", "string"]}, {"type": ["integer", "null"]}]}, 5),
        ("5", {"allOf": [{"description": "Any."}]}, "5"),
        ("1", {"$ref": "#/$defs/number"}, 1),
        ("2.5", {"$ref": "#/$defs/chain"}, 2.5),
        ("7", {"$ref": "#/$defs/a~1b~0c%25d"}, 7),
        ("true", {"$ref": "#/properties/odd~1~0%20%25"}, True),
        ("7", {"$ref": "#/properties/same"}, 7),
        ("7", {"$ref": "#/$defs/list/1"}, 7),
        ("7", {"$ref": "#/$defs/list/0"}, "7"),
        ("7", {"$ref": "#/$defs/list/9"}, "7"),
        ('{"x": 1}', {"$ref": "#"}, {"x": 1}),
        ("7", {"type": None, "enum": None, "anyOf": None, "$ref": None}, "7"),
        ("7", {"type": "integer", "enum": None, "allOf": None}, 7),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ("7", True, "7"),
        ("7", False, "7"),
        ("7", {"enum": []}, "7"),
    ],
)
def test_text_stands_for_what_the_schema_says(text: str, schema: Any, value: Any) -> None:
    found = typed(text, schema, ROOT)
    assert (found, type(found)) == (value, type(value))
    # And so in a call, wherever the parameters say it.
    parameters = [
        {**ROOT, "properties": {**ROOT["properties"], "p": schema}},
        {
            "$defs": {**ROOT["$defs"], "all": {"properties": {"p": schema}}},
            "$ref": "#/$defs/all",
            **ROOT,
        },
    ]
    parameters[1]["$defs"] = {**ROOT["$defs"], "all": {"properties": {"p": schema}}}
    for root in parameters:
        if schema == {"$ref": "#"}:
            continue
        text_of_call = f"<tool_call>\n<function=f>\n<parameter=p>\n{text}\n</parameter>\n</function>\n</tool_call>"
        (call,) = CallScanner(FORMATS["qwen3_coder"], {"f": root}, False).read(text_of_call, final=True)
        assert isinstance(call, ToolCall)
        assert json.loads(call.arguments) == {"p": value}


def test_arguments_are_found_wherever_they_stand() -> None:
    integer, text = {"type": "integer"}, {"type": "string"}
    for schema in (
        {"properties": {"a": integer}},
        {"allOf": [{"properties": {"b": text}}, {"properties": {"a": integer}}]},
        {"anyOf": [{"properties": {"a": integer}}, {"properties": {"b": text}}]},
        {"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"a": integer}}}},
        {"additionalProperties": integer},
        {"properties": {"b": text}, "additionalProperties": integer},
    ):
        assert typed("1", argument(schema, "a"), schema) == 1, schema
    for schema in (None, {}, {"properties": None}, {"additionalProperties": False}, {"properties": {"a": None}}, True):
        assert typed("1", argument(schema, "a"), schema) == "1", schema


def test_nothing_takes_long() -> None:
    """Alternatives of alternatives, chains and circles."""
    diamonds = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(500)}
    pairs = {f"d{i}": {"allOf": [{"anyOf": [{"type": "integer"}, {"minimum": i}]}] * 3} for i in range(500)}
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    for defs in (diamonds, pairs, chain):
        root = {"$defs": defs, "properties": {"p": {"$ref": "#/$defs/d0"}}}
        typed("1", {"$ref": "#/$defs/d0"}, root)
        assert len(held(root, root, set())["$defs"]) <= 5001


# --- what a grammar can hold ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer)


def fits(compiler: Compiler, tokenizer: Tokenizer, schema: Any, value: Any, relaxed: set[str] | None = None) -> bool:
    matcher = compiler.compile(json_grammar(schema, relaxed=relaxed))
    return matcher.consume_tokens(tokenizer.encode(json.dumps(value))) and matcher.is_accepting()


RELAXED = [
    ({"type": "string", "pattern": "^(?=a)b"}, "pattern", "x", 1),
    ({"type": "string", "pattern": r"a\b"}, "pattern", "x", 1),
    ({"type": "string", "format": "regex"}, "format", "x", 1),
    ({"not": {"type": "string"}, "type": "integer"}, "not", 1, "x"),
    ({"type": "integer", "if": {"minimum": 1}, "then": {"maximum": 2}}, "if,then", 1, "x"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems", [1, 1], "x"),
    ({"type": "array", "contains": {"const": 1}, "minContains": 1}, "contains,minContains", [2], "x"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", {"a": 1}, "x"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies", {"a": 1}, "x"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties", {"a": 1}, "x"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames", {"b": 1}, "x"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "required", {}, {"a": 1}),
    ({"type": "object", "properties": {"a": {"type": "string"}}, "required": True}, "required", {"a": "x"}, {"a": 1}),
    (
        {"type": "object", "patternProperties": {"^(?!a)": {"type": "null"}}, "additionalProperties": False},
        "patternProperties",
        {"b": 1},
        "x",
    ),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"not": {}}}}, "not", {"a": 1}, 1.5),
]


@pytest.mark.parametrize(("schema", "names", "right", "wrong"), RELAXED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_held_is_left_out_and_named(compiler, tokenizer, schema, names, right, wrong):
    relaxed: set[str] = set()
    assert fits(compiler, tokenizer, schema, right, relaxed)
    assert ",".join(sorted(relaxed)) == names
    assert not fits(compiler, tokenizer, {"type": "object", **schema} if wrong == 1.5 else schema, wrong, set())
    with pytest.raises(GrammarError):
        compiler.compile(json_grammar(schema))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"$ref": "#/properties/x", "properties": {"x": {"type": "integer"}}}, 1, "x"),
        ({"$ref": "#/$defs/a~1b~0%25", "$defs": {"a/b~%": {"type": "integer"}}}, 1, "x"),
        ({"$id": "http://a/b", "$ref": "http://a/b#/$defs/x", "$defs": {"x": {"type": "integer"}}}, 1, "x"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, {"a": {}}, {"a": 1}),
        ({"type": "integer", "enum": None, "pattern": None, "anyOf": None, "required": None, "$ref": None}, 1, "x"),
        ({"type": "object", "properties": None, "required": None, "$defs": None}, {"a": 1}, 1),
        ({"type": "object", "properties": {"a": None, "b": True}, "required": ["a"]}, {"a": 1}, {"b": 1}),
        ({"const": None}, None, 1),
        ({"type": "array", "uniqueItems": False, "items": {"type": "integer"}}, [1, 1], ["x"]),
        ({"type": "integer", "format": "int32", "x-more": 1, "default": None}, 1, "x"),
        ({"anyOf": [False, {"type": "integer"}]}, 1, "x"),
        ({"type": "string", "pattern": "^a$", "format": None}, "a", "b"),
    ],
    ids=str,
)
def test_what_can_be_held_is_held(compiler, tokenizer, schema, right, wrong):
    for relaxed in (None, set()):
        assert fits(compiler, tokenizer, schema, right, relaxed)
        assert not fits(compiler, tokenizer, schema, wrong, relaxed)
        assert not relaxed


@pytest.mark.parametrize("key", sorted({"$defs", "nullable", "title", *_KEPT, *UNHELD}))
def test_no_junk_is_too_much(compiler, tokenizer, key):
    for junk in (
        7,
        "x",
        "#",
        "#/x/-1",
        [],
        [[]],
        [7],
        {},
        {"a": 7},
        {"a": []},
        True,
        False,
        1.5,
        None,
        [None],
        {"": None},
    ):
        for beside in ({}, {"type": "object", "additionalProperties": False, "required": ["a"]}):
            schema = {**beside, key: junk}
            typed("1", schema, schema)
            typed("1", argument(schema, "a"), schema)
            for relaxed in (None, set()):
                with contextlib.suppress(GrammarError):
                    compiler.compile(json_grammar(schema, relaxed=relaxed))
            parameters = {"properties": {"a": {key: junk}}}
            for form in ("qwen3_coder", "llama3_json"):
                options: Any = {"single": True, "thinking": None, "opened": False, "tokenizer": tokenizer}
                answer_grammar(FORMATS[form], [tool(parameters=parameters)], None, relaxed=set(), **options)


# --- forced calls, by random schemas --------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "path", "é", 'q"', "a/b~c"])
STRINGS = st.sampled_from(["a", "1", "null", "x\ny", "<b>", "", " ", "日本"])
SCALARS = st.one_of(STRINGS, st.integers(-9, 9), st.booleans(), st.none(), st.sampled_from([0.5, -2.5]))
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2), max_leaves=4
)
LEAVES = st.one_of(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "string", "minLength": 1, "maxLength": 3},
            {"type": "string", "pattern": "^[ab]{1,3}$"},
            {"type": "string", "pattern": "^(?!a)"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "frob"},
            {"type": "integer"},
            {"type": "integer", "minimum": 0, "maximum": 9},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["string", "null"]},
            {"type": ["integer", "string"]},
            {},
            True,
            None,
            {"enum": None, "type": "integer"},
            {"$ref": "#/$defs/x"},
            {"$ref": "#/$defs/y~1z"},
            {"$ref": "#/properties/a"},
            {"not": {"type": "integer"}},
        ]
    ),
    st.lists(ANY, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    ANY.map(lambda value: {"const": value}),
)


def objects(inner: Any) -> Any:
    return st.builds(
        lambda listed, required, more: {
            "type": "object",
            "properties": listed,
            "required": [key for key in required if key in listed] if required is not None else None,
            **more,
        },
        st.dictionaries(NAMES, inner, max_size=3),
        st.none() | st.lists(NAMES, max_size=3, unique=True),
        st.sampled_from([{}, {"additionalProperties": False}]),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
        st.lists(inner, min_size=1, max_size=2).map(lambda found: {"oneOf": found}),
        inner.map(lambda found: {"allOf": [found], "description": "One."}),
    ),
    max_leaves=6,
)
DEFS = st.fixed_dictionaries({"x": LEAVES, "y/z": LEAVES})
PARAMETERS = st.builds(
    lambda made, listed, defs: {**(listed if made is None else {made: [listed]}), "$defs": defs},
    st.sampled_from([None, None, None, "allOf", "anyOf"]),
    objects(SCHEMAS),
    DEFS,
)
ENDS = ["\n</parameter>\n", '"', "}", "]", "null", "1", "a"]


def walked(matcher: LLMatcher, tokenizer: Tokenizer, pick: random.Random, most: int = 800) -> str | None:
    """A text that a grammar lets through, at random, rather a short one; None if it gets too long."""
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    tokens: list[int] = []
    while not (matcher.is_accepting() and (matcher.is_stopped() or pick.random() < 0.3)):
        wanted = tokenizer.encode(pick.choice(ENDS)) if pick.random() < 0.7 else []
        count = matcher.validate_tokens(wanted)
        if not wanted or count < len(wanted):
            fill_next_token_bitmask(matcher, mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if not (choices := [int(i) for i in allowed if i not in tokenizer.eos_token_ids]):
                assert matcher.is_accepting()
                break
            wanted = [pick.choice(choices)]
        assert matcher.consume_tokens(wanted)
        tokens += wanted
        if len(tokens) > most:
            return None
    return tokenizer.decode(tokens, skip_special_tokens=False)


def clean(schema: Any) -> Any:
    """For a library that takes null keywords for errors, and `oneOf` as it is written."""
    if not isinstance(schema, dict):
        return True if schema is None else schema
    made = {key: value for key, value in schema.items() if value is not None or key == "const"}
    for key in ("properties", "$defs"):
        made |= {key: {name: clean(inner) for name, inner in made[key].items()}} if key in made else {}
    for key in made.keys() & {"anyOf", "oneOf", "allOf"}:
        made["anyOf" if key == "oneOf" else key] = [clean(inner) for inner in made.pop(key)]
    return {**made, "items": clean(made["items"])} if "items" in made else made


@pytest.fixture(scope="module")
def compilers(tokenizers: dict[str, Tokenizer]) -> dict[str, Compiler]:
    return {form: Compiler(tokenizer) for form, tokenizer in tokenizers.items()}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(parameters=PARAMETERS, seed=st.integers(0, 2**32))
@example(parameters={"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, seed=0)
@example(parameters={"type": "object", "properties": {"a": {"allOf": [{"$ref": "#/properties/a"}]}}}, seed=0)
def test_forced_calls_are_valid(
    tokenizers: dict[str, Tokenizer], compilers: dict[str, Compiler], form: str, parameters: Any, seed: int
) -> None:
    tokenizer, relaxed = tokenizers[form], set[str]()
    grammar = answer_grammar(
        FORMATS[form], [tool("f", parameters=parameters)], None, single=True, thinking=None, opened=False,
        tokenizer=tokenizer, relaxed=relaxed,
    )  # fmt: skip
    try:
        matcher = compilers[form].compile(grammar)
    except GrammarError as error:
        if not re.search("nsatisfiable|no text|does not exist", str(error)):
            raise
        return
    text = walked(matcher, tokenizer, random.Random(seed))
    if text is None or re.search(r"\d[eE][+-]?\d{3}", text):  # numbers that no reader of JSON takes
        return
    parts = CallScanner(FORMATS[form], {"f": parameters}, False).read(text, final=True)
    assert [type(part) for part in parts] == [ToolCall], text
    call = parts[0]
    assert isinstance(call, ToolCall)
    if not relaxed:
        with suppress(RecursionError):  # that library goes round in circles
            jsonschema.validate(json.loads(call.arguments), clean(parameters), jsonschema.Draft202012Validator)


@settings(max_examples=100)
@given(parameters=PARAMETERS, values=st.dictionaries(NAMES, ANY, max_size=3), form=st.sampled_from(FORMS))
def test_calls_are_read_as_they_were_written(parameters: Any, values: dict[str, Any], form: str) -> None:
    """Where a text can stand for only one value that is valid."""
    schema = clean(parameters)
    checker = jsonschema.Draft202012Validator(schema)
    try:
        if not checker.is_valid(values):
            return
    except RecursionError:  # that library goes round in circles
        return
    for key, value in values.items():
        others: list[Any] = []
        for other in (json_or_none(spelled(value)), spelled(value)):
            if (type(other), other) != (type(value), value) and checker.is_valid({**values, key: other}):
                others.append(other)
        if others:
            return
    written = FORMATS[form].write([("f", values)])
    (call,) = CallScanner(FORMATS[form], {"f": parameters}, False).read(written, final=True)
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == values


def json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


# --- what a forced call of one tool lets through ---------------------------------------------------------------------


def forced(form: str, tokenizer: Tokenizer, parameters: Any, relaxed: set[str], **more: Any) -> LLMatcher:
    tools = [tool("f", parameters=parameters, **more)]
    options: Any = {"single": True, "thinking": None, "opened": False, "tokenizer": tokenizer, "relaxed": relaxed}
    return Compiler(tokenizer).compile(answer_grammar(FORMATS[form], tools, None, **options))


def ok(form: str, tokenizer: Tokenizer, parameters: Any, arguments: Any, relaxed: set[str] | None = None) -> bool:
    matcher = forced(form, tokenizer, parameters, set() if relaxed is None else relaxed)
    tokens = tokenizer.encode(FORMATS[form].write([("f", arguments)]))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


ONE = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}
POINT = {"properties": {"x": {"type": "integer"}, "y": {"$ref": "#/properties/x"}}, "required": ["x"]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        ({**POINT, "type": "object"}, {"x": 1, "y": 2}, {"x": 1, "y": "a"}),
        ({"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"x": {"enum": [1, 2]}}}}}, {"x": 1}, {"x": 3}),
        ({"allOf": [ONE, {"properties": {"z": {"const": 3}}, "required": ["z"]}]}, {"x": 1, "z": 3}, {"x": 1}),
        ({"anyOf": [ONE, {"properties": {"z": {"const": 3}}, "required": ["z"]}]}, {"z": 3}, {}),
        ({"properties": {"x": {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}}}, {"x": None}, {"x": "b"}),
        ({"properties": {"x": {"enum": ["a", 1, None, [1]]}}}, {"x": [1]}, {"x": 2}),
        ({"properties": {"x": {"type": "string"}}, "required": None}, {"x": "a"}, {"y": "a"}),
        ({"properties": None, "required": None}, {}, {"a": 1}),
        ({"properties": {"q": {"properties": {"self": {"$ref": "#"}}}}}, {"q": {"self": {}}}, {"q": {"self": 1}}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_forced_arguments_keep_to_their_schema(tokenizers, form, parameters, right, wrong):
    relaxed: set[str] = set()
    assert ok(form, tokenizers[form], parameters, right, relaxed)
    assert not ok(form, tokenizers[form], parameters, wrong)
    assert not relaxed


@pytest.mark.parametrize("form", FORMS)
def test_what_forced_arguments_are_not_held_to_is_named(tokenizers, form):
    tokenizer, relaxed = tokenizers[form], set[str]()
    odd = {"properties": {"x": {"type": "string", "pattern": "^(?=a)b"}}, "required": ["x", "gone"]}
    assert ok(form, tokenizer, odd, {"x": "c"}, relaxed)
    assert ok(form, tokenizer, odd, {"x": "c", "gone": "d"})
    assert not ok(form, tokenizer, odd, {})
    assert relaxed == {"pattern", "required"}
    relaxed.clear()
    with pytest.raises((GrammarError, ParameterError), match=r"look-around|pattern cannot be held"):
        forced(form, tokenizer, odd, relaxed, strict=True)
    assert not relaxed
    exact = {"properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
    forced(form, tokenizer, exact, relaxed, strict=True)
    bounded = {"properties": {"x": {"type": "string", "minLength": 2}}, "required": ["x"]}
    assert ok(form, tokenizer, bounded, {"x": "a"}, relaxed) == (form == "qwen3_coder") == bool(relaxed)


@pytest.mark.parametrize("mark", TAG_MARKS)
def test_forced_text_spells_no_mark(tokenizers, mark):
    schema = {"properties": {"x": {"type": "string"}}, "required": ["x"]}
    for text in (mark[:-1], f"<{mark[:-1]}", f"{mark[:-1]}<", "<p> </q>\n<parameter>"):
        assert ok("qwen3_coder", tokenizers["qwen3_coder"], schema, {"x": text})
    assert not ok("qwen3_coder", tokenizers["qwen3_coder"], schema, {"x": f"a{mark}b"})
