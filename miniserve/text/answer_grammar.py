"""What an answer has to match, as one grammar: its reasoning, then calls in the model's own format, or the format that
the request asks for.

Marks that are tokens of their own are named by id, so that the model writes the token that it knows. White space in
calls is what the models were trained on and nothing else: a small one would fill its whole answer with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from miniserve.api.structured import WHITESPACE
from miniserve.sampling_params import Grammar
from miniserve.text.calls import schema_types
from miniserve.text.formats import Format
from miniserve.text.grammar import quoted
from miniserve.text.reader import Thinking
from miniserve.text.tokenizer import Tokenizer

MOST_CALLS = 16
"""In one answer; without a bound a small model may call for ever."""
MISTRAL_ID = "[A-Za-z0-9]{9}"
"""A call's id as those of Mistral's models write it that do."""
TRAINED_SPACE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
FORMAT_SPACE: Mapping[str, Any] = {"whitespace_pattern": WHITESPACE}


def answer_grammar(
    form: Format,
    tools: list[dict[str, Any]],
    wanted: Grammar | None,
    *,
    single: bool,
    thinking: Thinking | None,
    opened: bool,
    tokenizer: Tokenizer,
) -> Grammar:
    """What an answer matches that calls one or more of `tools` (with `single` exactly one), or if there is a format
    `wanted` is in that instead. Before it there may be reasoning, by the marks of `thinking`; it has to be there where
    the prompt has `opened` it."""
    writer = _Writer(tokenizer, beside=wanted is not None)
    answers = []
    if tools:
        many = 1 if single or not form.parallel else MOST_CALLS
        answers.append(_LAYOUTS[form.name](writer, [tool["function"] for tool in tools], many - 1))
    if wanted is not None:
        answers.append(writer.format(wanted))
    start = writer.one_of("answer", answers)
    if thinking is not None:
        start = f"{writer.thought(thinking, opened)}{'' if opened else '?'} {start}"
    return Grammar("lark", "\n".join([f"start: {start}", *writer.rules]) + "\n")


def _slashed(expression: str) -> str:
    """A regular expression as it has to be written between slashes."""
    escapes = {"/": "\\/", "\n": "\\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), expression, flags=re.DOTALL)


def _without(mark: str) -> str:
    """An expression for all text in which `mark` does not occur. Its first character occurs in it only once."""
    first, *rest = map(re.escape, mark)
    assert first not in rest
    ways = []  # how text goes on behind the first character: as the mark does, and then not
    for number, character in enumerate(rest):
        ways.append(f"{''.join(rest[:number])}(?:[^{first}{character}][^{first}]*)?")
    return _slashed(f"[^{first}]*(?:{first}(?:{'|'.join(ways)}))*")


class _Writer:
    """Collects the rules of one grammar. `beside` says that calls are not the only answers."""

    def __init__(self, tokenizer: Tokenizer, beside: bool) -> None:
        self.rules: list[str] = []
        self.beside = beside
        self._tokenizer = tokenizer
        self._names: dict[str, str] = {}

    def rule(self, name: str, body: str, kind: str = "") -> str:
        """A rule, under this name or another one that means the same: tools have many arguments that are alike."""
        if (text := kind + body) not in self._names:
            self._names[text] = name
            self.rules.append(f"{name}{kind}: {body}")
        return self._names[text]

    def mark(self, text: str) -> str:
        """A mark: the token for it, or its characters."""
        token = self._tokenizer.control_id(text)
        return quoted(text) if token is None else f"<[{token}]>"

    def schema(self, name: str, schema: dict[str, Any], strict: bool, space: Mapping[str, Any] = TRAINED_SPACE) -> str:
        """A rule for JSON that is valid by `schema`. Where `strict` is not asked for, keywords that the grammar knows
        nothing of are passed over, and alternatives are taken to exclude each other."""
        style = {**space, "lenient": not strict, "coerce_one_of": not strict}
        return self.rule(name, f"%json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}")

    def one_of(self, name: str, choices: list[str]) -> str:
        """A rule for one of `choices`."""
        return self.rule(name, " | ".join(choices))

    def format(self, wanted: Grammar) -> str:
        """A rule for a whole other grammar."""
        match wanted.kind:
            case "json_schema":
                body = f"%json {wanted.text}"
            case "regex":
                body = f"/(?:{_slashed(wanted.text)})/"
            case "lark":
                body = f"%lark {{\n{wanted.text}\n}}"
        return self.rule("format", body)

    def thought(self, thinking: Thinking, opened: bool) -> str:
        """The rule of the reasoning. Whoever reads it ends it where the mark stands, a token or spelled out."""
        start, text = self.mark(thinking.start), _without(thinking.end)
        if self._tokenizer.control_id(thinking.end) is None:
            end = f"/{text}{_slashed(re.escape(thinking.end))}/"
        else:
            end = f"/{text}/ {self.mark(thinking.end)}"
        return self.rule("thought", f"{start}{'?' if opened else ''} {end} /\\s{{0,4}}/")


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments. As other servers have it, only what is listed may be given, unless the
    schema says something about the rest."""
    schema = {"type": "object", **(function.get("parameters") or {})}
    if schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties"}:
        return schema
    return {**schema, "properties": schema.get("properties", {}), "additionalProperties": False}


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """What references in a part of `schema` are about, for that part by itself."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _objects(writer: _Writer, functions: list[dict[str, Any]], key: str, more: str = "") -> str:
    """A rule for a call of one of `functions` as a JSON object; `key` is what holds the arguments, `more` follows."""
    choices = []
    for number, function in enumerate(functions):
        schema = writer.schema(f"a{number}", _parameters(function), bool(function.get("strict")))
        head = f'{{"name": {quoted(function["name"])}, "{key}": '
        choices.append(f'{quoted(head)} {schema} {more} "}}"')
    return writer.one_of("call", choices)


def _repeated(rule: str, separator: str, more: int) -> str:
    again = f"{quoted(separator)} {rule}" if separator else rule
    return f"{rule} ({again}){{0,{more}}}" if more else rule


def _hermes(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    call = _objects(writer, functions, "arguments")
    tagged = writer.rule("tagged", f'{writer.mark("<tool_call>")} "\\n" {call} "\\n" {writer.mark("</tool_call>")}')
    return _repeated(tagged, "\n", more)


def _smollm2(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    calls = _repeated(_objects(writer, functions, "arguments"), ", ", more)
    return f'{writer.mark("<tool_call>")} "[" {calls} "]" {writer.mark("</tool_call>")}'


def _llama3_json(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    if not writer.beside:
        return _repeated(_objects(writer, functions, "parameters"), "; ", more)
    # Nothing but what is in it tells such a call from another object, so both have to be made of the same pieces.
    choices = []
    for number, function in enumerate(functions):
        parameters = _parameters(function)
        wrapped = {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
            **_definitions(parameters),
        }
        choices.append(writer.schema(f"a{number}", wrapped, bool(function.get("strict")), FORMAT_SPACE))
    return writer.one_of("call", choices)


def _mistral(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    id = f'(/, "id": "{MISTRAL_ID}"/)?'
    calls = _repeated(_objects(writer, functions, "arguments", id), ", ", more)
    return f'{writer.mark("[TOOL_CALLS]")} / ?\\[/ {calls} "]"'  # some were trained with the space, some without


def _mistral_args(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    choices = []
    for number, function in enumerate(functions):
        schema = writer.schema(f"a{number}", _parameters(function), bool(function.get("strict")))
        choices.append(
            f"{writer.mark('[TOOL_CALLS]')} {quoted(function['name'])} ({writer.mark('[CALL_ID]')} /{MISTRAL_ID}/)? "
            f"{writer.mark('[ARGS]')} {schema}"
        )
    return _repeated(writer.one_of("call", choices), "", more)


def _qwen3_coder(writer: _Writer, functions: list[dict[str, Any]], more: int) -> str:
    choices = []
    for number, function in enumerate(functions):
        schema = _parameters(function)
        parts = [quoted(f"<function={function['name']}>\n")]
        for index, (key, kind) in enumerate(schema["properties"].items() if "properties" in schema else ()):
            name = f"p{number}_{index}"
            rule = f"{quoted(f'<parameter={key}>' + chr(10))} {_plain(writer, name, kind, schema, function)}"
            parts.append(rule if key in schema.get("required", ()) else f"({rule})?")
        choices.append(" ".join([*parts, '"</function>\\n"']))
    call = writer.one_of("call", choices)
    tagged = writer.rule("tagged", f'{writer.mark("<tool_call>")} "\\n" {call} {writer.mark("</tool_call>")}')
    return _repeated(tagged, "\n", more)


def _plain(writer: _Writer, name: str, kind: Any, schema: dict[str, Any], function: dict[str, Any]) -> str:
    """An argument as Qwen3-Coder writes it, with the tag that closes it: text without quotes, all else as JSON."""
    close = writer.rule("close", quoted("\n</parameter>\n"))
    kind = kind if isinstance(kind, dict) else {}
    values = kind.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return f"{writer.one_of(name, [quoted(value) for value in values])} {close}"
    if not (types := schema_types(kind, schema)) or "string" in types:
        return writer.rule("text", "/(?s:.*)\\n<\\/parameter>\\n/", "[lazy]")
    return f"{writer.schema(name, {**kind, **_definitions(schema)}, bool(function.get('strict')))} {close}"


_LAYOUTS: dict[str, Callable[[_Writer, list[dict[str, Any]], int], str]] = {
    "hermes": _hermes,
    "smollm2": _smollm2,
    "qwen3_coder": _qwen3_coder,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "mistral_args": _mistral_args,
}
