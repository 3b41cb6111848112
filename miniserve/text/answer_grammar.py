"""What an answer has to match, as one grammar: its reasoning, then calls in the model's own format, or the format that
the request asks for.

Marks that are tokens of their own are named by id, so that the model writes the token that it knows. White space in
calls is what the models were trained on and nothing else: a small one would fill its whole answer with it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from miniserve.config import problem
from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.call_parsers import TAG_MARKS
from miniserve.text.formats import PIECES, ReasoningMarks, ToolFormat
from miniserve.text.grammar import WHITESPACE, quoted
from miniserve.text.schemas import BOUNDS, UNHELD, Way, argument, held, properties, says, spelled, types, values, ways
from miniserve.text.tokenizer import Tokenizer

MOST_CALLS = 16
"""In one answer; without a bound a small model may call for ever."""
TRAINED_SPACE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
FORMAT_SPACE: Mapping[str, Any] = {"whitespace_pattern": WHITESPACE}


def answer_grammar(
    form: ToolFormat,
    tools: list[dict[str, Any]],
    wanted: Grammar | None,
    *,
    single: bool,
    thinking: ReasoningMarks | None,
    opened: bool,
    tokenizer: Tokenizer,
    relaxed: set[str],
) -> Grammar:
    """What an answer matches that calls one or more of `tools` (with `single` exactly one), or if there is a format
    `wanted` is in that instead. Before it there may be reasoning, by the marks of `thinking`; it has to be there where
    the prompt has `opened` it. Keywords in the schemas of tools that cannot be held are left out and added to
    `relaxed`. Raises `ParameterError` if such stand in a tool that is strict."""
    writer = _Writer(tokenizer, form, relaxed)
    answers = []
    if tools:
        most = 1 if single or not form.parallel else MOST_CALLS
        answers.append(writer.calls([tool["function"] for tool in tools], most, beside=wanted is not None))
    if wanted is not None:
        answers.append(writer.whole(wanted))
    start = writer.one_of("answer", answers)
    if thinking is not None:
        start = f"{writer.reasoning(thinking, opened)}{'' if opened else '?'} {start}"
    return Grammar("lark", "\n".join([f"start: {start}", *writer.lines]) + "\n")


class _Writer:
    """Writes the rules of one grammar, `lines`. Its methods return expressions for what has to stand there."""

    def __init__(self, tokenizer: Tokenizer, form: ToolFormat, relaxed: set[str]) -> None:
        self.lines: list[str] = []
        self._relaxed = relaxed
        self._tokenizer = tokenizer
        self._form = form
        self._marks = re.compile(f"({'|'.join(map(re.escape, form.marks))})")
        self._names: dict[str, str] = {}

    def rule(self, name: str, body: str) -> str:
        """A rule, under this name or another one that means the same: tools have many arguments that are alike."""
        if body not in self._names:
            self._names[body] = name
            self.lines.append(f"{name}: {body}")
        return self._names[body]

    def one_of(self, name: str, choices: Iterable[str]) -> str:
        return self.rule(name, " | ".join(choices))

    def schema(
        self, name: str, schema: Any, root: dict[str, Any], strict: bool, space: Mapping[str, Any] = TRAINED_SPACE
    ) -> str:
        """A rule for JSON that is valid by `schema`, a part of `root`. Unless `strict`, what the grammar cannot hold is
        left out, and alternatives are taken to exclude each other."""
        made = held(schema, root, None if strict else self._relaxed)
        made["x-guidance"] = {**space, "coerce_one_of": not strict}
        return self.rule(name, f"%json {json.dumps(made, ensure_ascii=False)}")

    def mark(self, text: str) -> str:
        """A mark: the token for it, or its characters."""
        token = self._tokenizer.control_id(text)
        return quoted(text) if token is None else f"<[{token}]>"

    def calls(self, functions: list[dict[str, Any]], most: int, beside: bool) -> str:
        """Up to `most` calls of `functions`. `beside` says that calls are not the only answers."""
        if self._form.bare and beside:
            return self.one_of("call", [self._object(*item) for item in enumerate(functions)])
        call = self.one_of("call", [self._sequence(self._form.call, *item) for item in enumerate(functions)])
        again = f"{self._text(self._form.separator)} {call}"
        calls = f"{call} ({again}){{0,{most - 1}}}" if most > 1 else call
        return f"{self._sequence(self._form.begin)} {calls} {self._text(self._form.end)}"

    def _object(self, number: int, function: dict[str, Any]) -> str:
        """A call without marks. Only what is in it separates it from another object, so both have to be made of the
        same pieces: it is JSON with a schema, too."""
        parameters, strict = self._parameters(function), bool(function.get("strict"))
        inner = held(parameters, parameters, None if strict else self._relaxed)
        wrapped = {
            "type": "object",
            "$defs": inner.pop("$defs", {}),
            "properties": {"name": {"const": function["name"]}, "parameters": inner},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        return self.schema(f"a{number}", wrapped, wrapped, strict, FORMAT_SPACE)

    def _sequence(self, text: str, number: int = 0, function: Mapping[str, Any] | None = None) -> str:
        """A part of a call of the `function` with this `number`, as formats.toml writes it."""
        return " ".join(self._piece(piece, number, function or {}) for piece in PIECES.split(text) if piece)

    def _piece(self, piece: str, number: int, function: Mapping[str, Any]) -> str:
        match piece:
            case "$NAME":
                return quoted(function["name"])
            case "$QUOTED_NAME":
                return quoted(json.dumps(function["name"]))
            case "$ARGUMENTS":
                parameters = self._parameters(function)
                return self.schema(f"a{number}", parameters, parameters, bool(function.get("strict")))
            case "$PARAMETERS":
                return self._tagged(number, function)
            case "$CALL_ID":
                return "/[A-Za-z0-9]{9}/"
        maybe = piece.removeprefix("<<").removesuffix(">>")
        return self._text(piece) if maybe == piece else f"({self._sequence(maybe)})?"

    def _text(self, text: str) -> str:
        """A rule for a fixed text and the marks in it: it stands in the calls of many tools."""
        parts = self._marks.split(text)
        found = [self.mark(part) if i % 2 else quoted(part) for i, part in enumerate(parts) if part]
        return self.rule(f"t{len(self._names)}", " ".join(found)) if found else ""

    def _tagged(self, number: int, function: Mapping[str, Any]) -> str:
        """The arguments of a function in Qwen3-Coder's tags, in the order of its schema."""
        schema, strict = self._parameters(function), bool(function.get("strict"))
        choices = []
        for choice, way in enumerate(ways(schema, schema)):
            self._leave_out(way, UNHELD | {"enum", "const", "minProperties", "maxProperties"}, strict)
            named, required = properties(way)
            parts: list[str] = []
            for key in dict.fromkeys((*named, *required)):
                kind = named[key] if key in named else argument(schema, key)
                if kind is not False:
                    value = self._value(f"p{number}_{choice}_{len(parts)}", kind, schema, strict)
                    rule = f"{quoted(f'<parameter={key}>' + chr(10))} {value}"
                    parts.append(rule if key in required else f"({rule})?")
            choices.append(" ".join(parts) or '""')
        return f"({' | '.join(choices)})"

    def _value(self, name: str, kind: Any, root: dict[str, Any], strict: bool) -> str:
        """An argument with its closing tag: free text without quotes and marks, held to nothing else, or JSON."""
        found = ways(kind, root)
        texts = [way for way in found if "string" in types(way) and values(way) is None]
        if texts:
            for way in texts if all(types(way) <= {"string"} for way in found) else found:
                self._leave_out(way, UNHELD | BOUNDS, strict)
            return self.rule("text", f"/{_without(*TAG_MARKS)}\\n<\\/parameter>\\n/")
        named = [quoted(spelled(value)) for way in found for value in values(way) or ()]
        choices = [self.one_of(f"{name}v", named)] if named else []
        if not named or any(values(way) is None for way in found):
            choices.append(self.schema(name, kind, root, strict))
        close = self.rule("close", quoted("\n</parameter>\n"))
        return f"({' | '.join(choices)}) {close}"

    def _leave_out(self, way: Way, keywords: Set[str], strict: bool) -> None:
        """Say that the grammar does not hold these keywords, if they are there."""
        found = {key for part in way for key in part.keys() & keywords if says(key, part[key])}
        if strict and found:
            raise ParameterError("tools", problem("text.strict_tool", keys=", ".join(sorted(found))))
        self._relaxed |= found

    def _parameters(self, function: Mapping[str, Any]) -> dict[str, Any]:
        """A function's schema. Only what it lists may be given, as with other servers, unless it speaks of the rest."""
        schema = {key: value for key, value in (function.get("parameters") or {}).items() if value is not None}
        schema = {"type": "object", **schema}
        if schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties"}:
            return schema
        listed, required = schema.get("properties", {}), schema.get("required", [])
        unlisted = [key for key in required if key not in listed]
        if unlisted and not function.get("strict"):
            self._relaxed.add("required")
            schema["required"] = [key for key in required if key in listed]
        return {**schema, "properties": {**listed, **dict.fromkeys(unlisted, True)}, "additionalProperties": False}

    def whole(self, wanted: Grammar) -> str:
        match wanted.kind:
            case "json_schema":
                body = f"%json {wanted.text}"
            case "regex":
                body = f"/(?:{_slashed(wanted.text)})/"
            case "lark":
                body = f"%lark {{\n{wanted.text}\n}}"
        return self.rule("format", body)

    def reasoning(self, thinking: ReasoningMarks, opened: bool) -> str:
        """A rule for the reasoning. A `Reader` ends it where the end mark is spelled, so text before it does not."""
        start, text = self.mark(thinking.start), _without(thinking.end)
        if self._tokenizer.control_id(thinking.end) is None:
            end = f"/{text}{_slashed(re.escape(thinking.end))}/"
        else:
            end = f"/{text}/ {self.mark(thinking.end)}"
        return self.rule("thought", f"{start}{'?' if opened else ''} {end} /\\s{{0,4}}/")


def _slashed(expression: str) -> str:
    escapes = {"/": "\\/", "\n": "\\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), expression, flags=re.DOTALL)


def _without(*marks: str) -> str:
    """An expression for text without any of `marks`. They begin with the same character, each has it only once."""
    first = re.escape(marks[0][0])
    assert all(mark[0] == marks[0][0] not in mark[1:] for mark in marks)

    def rest(ends: list[str]) -> str:
        """How text goes on behind the first characters of marks that end so: as one of them does, and then not."""
        heads = sorted({end[0] for end in ends})
        choices = [f"[^{first}{''.join(map(re.escape, heads))}][^{first}]*"]
        for head in heads:
            if all(tails := [end[1:] for end in ends if end[0] == head]):
                choices.append(re.escape(head) + rest(tails))
        return f"(?:{'|'.join(choices)})?"

    return _slashed(f"[^{first}]*(?:{first}{rest([mark[1:] for mark in marks])})*")
