"""Grammars are compiled over a vocabulary, and what would cost too much is refused before that."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from miniserve.hub import resolve as hub
from miniserve.sampling_params import Grammar
from miniserve.text import grammar
from miniserve.text.grammar import Compiler, GrammarError, check_bounds, json_grammar, quoted
from miniserve.text.tokenizer import Tokenizer
from tests.support.schemas import nested


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer)


def test_the_cache_is_bounded(tokenizer, monkeypatch):
    compiler = Compiler(tokenizer)
    monkeypatch.setitem(grammar.BOUNDS, "cached", 3)
    monkeypatch.setitem(grammar.BOUNDS, "cached_chars", 2000)
    for number in range(5):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert [known.text for known in compiler._cache] == ["a2", "a3", "a4"]
    compiler.compile(Grammar("regex", "a" * 1999))
    assert len(compiler._cache) == 1


TOO_MUCH = {
    "characters": Grammar("regex", "a" * 5000),
    "nested more than": json_grammar(nested(99)),
    "has 5000 properties": json_grammar({"properties": {f"p{i}": {} for i in range(5000)}}),
    "has 600 `patternProperties`": json_grammar({"patternProperties": {f"^x{i}y.*$": {} for i in range(600)}}),
    "`multipleOf`": json_grammar({"allOf": [{"type": "integer", "multipleOf": k} for k in (97, 89, 83)]}),
    "combines patterns": json_grammar({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]}),
    "a pattern has more than": json_grammar({"type": "string", "pattern": "a" * 1025}),
    "least common": Grammar("lark", 'start: "x" %json {"type": "integer", "multipleOf": 9999991}'),
    "its rules have": Grammar("lark", "start: " + '"a" ' * 40000),
    "operators & and ~": Grammar("lark", "start: T\nT: /.*a.{15}.*/ & /.*b.{15}.*/ & ~/.*c.{17}.*/\n"),
    "not valid JSON": Grammar("lark", "start: %json // not {\n{}"),
}


@pytest.mark.parametrize("reason", TOO_MUCH)
def test_what_the_library_does_not_bound_is_refused_at_once(reason):
    started = time.process_time()
    with pytest.raises(GrammarError, match=reason):
        check_bounds(TOO_MUCH[reason])
    assert time.process_time() - started < 0.5


def many_schemas(count: int, schema: dict[str, Any]) -> Grammar:
    """As where one of many tools has to be called."""
    rules = (f"j{i}: %json {json.dumps(schema)}" for i in range(count))
    return Grammar("lark", "\n".join([f"start: {' | '.join(f'j{i}' for i in range(count))}", *rules]))


@pytest.mark.parametrize("text", ['"' + '\\"' * 8000, "/" + "\\/" * 8000, '"\\' * 8000, '"\n' * 8000])
def test_bounds_are_checked_in_no_time(compiler, text):
    """Python's searches let no other thread run."""
    started = time.process_time()
    with contextlib.suppress(GrammarError):
        check_bounds(Grammar("lark", text))
    assert time.process_time() - started < 0.2
    with pytest.raises(GrammarError):
        compiler.compile(Grammar("lark", f"start: {text}"))


@pytest.mark.parametrize(
    "hidden", ['T: "a" & /b/', 'T: /x"/ & /b/', 'T: "a" // "\n  & /b/', "T: /[/ ~ /b/", 'T: "\\"" & "']
)
def test_operators_do_not_hide(hidden):
    with pytest.raises(GrammarError, match="operators"):
        check_bounds(Grammar("lark", f"start: T\n{hidden}\n"))
    check_bounds(Grammar("lark", 'start: T\nT: "&" // ~\n | /&[~]/ # &'))


CATASTROPHES = [
    Grammar("regex", "((a{1,100}){1,100}){1,100}"),
    Grammar("regex", "(a+)+(a+)+(a+)+$"),
    Grammar("regex", "(.*[a-m].{12}|.*[f-z].{15}|.*[a-z0-9].{18})+"),
    Grammar("regex", "(" * 2000 + "a" + ")" * 2000),
    Grammar("regex", r"\p{L}{1,500}(\p{Lu}|\p{N}){30,500}"),
    Grammar("lark", 'start: e\ne: e e | e e e | /[a-z]/ | /[a-m]+/ | ""\n'),
    Grammar("lark", "start: " + "(" * 500 + '"a"' + ")" * 500),
    json_grammar({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
    json_grammar({"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for j in range(5)]} for i in range(12)]}),
    json_grammar({"$ref": "#"}),
    json_grammar({"patternProperties": {"a.{15}$": {}}, "additionalProperties": {"type": "null"}}),
    json_grammar({"allOf": [{"type": "string", "pattern": f"{c}.{{15}}$"} for c in "abc"]}),
    json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    json_grammar({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 100, "maxLength": 2000}),
    json_grammar({"enum": [f"v{i * 31}" for i in range(5000)]}),
    json_grammar({"patternProperties": {f"^x{i}y.*$": {} for i in range(32)}}),
    many_schemas(100, {"patternProperties": {f"^x{i}y.*$": {} for i in range(32)}}),
    many_schemas(160, {"properties": {f"p{i}": {"type": "string", "pattern": "^(a.*|b.*)x$"} for i in range(30)}}),
]


@pytest.mark.parametrize("wanted", CATASTROPHES, ids=lambda g: g.text[:30])
def test_catastrophes_compile_or_fail_in_time(compiler, wanted):
    started = time.process_time()
    with contextlib.suppress(GrammarError):
        compiler.compile(wanted)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "text", ['a"b\\c', "новый", "tab\there\nnl", "/x/", "😀 ü", "\x01\x7f", "\\d+", "${x}", "%json {"]
)
def test_quoted_text_is_itself(tokenizer, compiler, text):
    matcher = compiler.compile(Grammar("lark", f"start: {quoted(text)}"))
    assert matcher.consume_tokens(tokenizer.encode(text))
    assert matcher.is_accepting()
    assert matcher.is_stopped()
