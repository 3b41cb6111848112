"""Parsers of tool calls, one for each family of formats (`formats.py`).

A `CallParser` is made at each place where a call may begin. It looks at every character once however the text arrives,
and ends with the calls that stand there, or with the finding that this is no call.
"""

import json
import re
from typing import Any, NamedTuple, Protocol

from miniserve.text.calls import Call, Schemas, call_with, json_calls, typed


class ParsedCalls(NamedTuple):
    """What a parser has come to. Without `calls` the text up to `end` is no call."""

    calls: list[Call]
    end: int


class CallParser(Protocol):
    def read(self, text: str, final: bool) -> ParsedCalls | None:
        """`text` begins there, and is longer each time; None until more of it is needed. `final`: no more will come."""


class _JsonParser:
    """What the parsers below share: they look for the end of a JSON object or list."""

    _STRING = re.compile(r'[^"\\]*')
    _OTHER = re.compile(r"[\s\w.,:+-]*")

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._at = 0  # so far the JSON was looked at
        self._depth = 0
        self._quoted = False

    def _json_end(self, text: str, start: int) -> int | ParsedCalls | None:
        """Where the JSON ends that begins with a bracket at `start`. None while more text is needed, and the finding
        that this is no call where it holds what stands in no JSON."""
        self._at = max(self._at, start)
        while self._at == start or self._depth:
            passed = (self._STRING if self._quoted else self._OTHER).match(text, self._at)
            assert passed is not None  # both match nothing, too
            self._at = passed.end()
            if self._at == len(text):
                return None
            character = text[self._at]
            if character == "\\" and self._quoted:
                if self._at + 1 == len(text):
                    return None
                self._at += 1
            elif character == '"':
                self._quoted = not self._quoted
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            else:
                return ParsedCalls([], self._at)
            self._at += 1
        return self._at


class TagParser(_JsonParser):
    """Hermes, Qwen and SmolLM2: JSON, an object or a list, in <tool_call>; Qwen3-Coder: <function=...> in it, or alone.

    Inside of a JSON string the closing tag is a part of the string.
    """

    _OPEN = re.compile(r"(?:<tool_call>)?\s*")
    _CLOSE = "</tool_call>"
    _FUNCTION = "<function="
    _FUNCTION_END = "</function>"
    _HEAD = re.compile(r"<function=([^<>\s]+)>\s*")
    _PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._searched = 0

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        opened = self._OPEN.match(text)
        assert opened is not None
        start = opened.end()
        head = text[start : start + len(self._FUNCTION)]
        if head.startswith(("{", "[")):
            return self._read_json(text, start, final)
        if head == self._FUNCTION:
            return self._read_function(text, start, final)
        return None if self._FUNCTION.startswith(head) else ParsedCalls([], start)

    def _read_json(self, text: str, start: int, final: bool) -> ParsedCalls | None:
        end = self._json_end(text, start)
        if not isinstance(end, int):
            return end
        close = self._closing(text, end, final)
        if close is None:
            return None
        return ParsedCalls(json_calls(text[start:end]) if close else [], close or end)

    def _read_function(self, text: str, start: int, final: bool) -> ParsedCalls | None:
        while (at := text.find(self._FUNCTION_END, max(self._searched, start))) >= 0:
            end = at + len(self._FUNCTION_END)
            close = self._closing(text, end, final)
            if close is None:
                return None
            if close or not start:  # without <tool_call> before it, none need close it
                return ParsedCalls(self._function(text[start:at]), close or end)
            self._searched = end  # it stands in an argument
        self._searched = max(self._searched, len(text) - len(self._FUNCTION_END) + 1)
        return None

    def _closing(self, text: str, end: int, final: bool) -> int | None:
        """Where the closing tag after `end` ends; 0 if something else stands there, None if that cannot be known yet.
        A model that stops before it has still said all there is to say."""
        rest = text[end:].lstrip()
        if rest.startswith(self._CLOSE):
            return len(text) - len(rest) + len(self._CLOSE)
        if not self._CLOSE.startswith(rest):
            return 0
        return len(text) if final else None

    def _function(self, body: str) -> list[Call]:
        head = self._HEAD.match(body)
        if head is None:
            return []
        schema = self._schemas.get(head[1])
        properties = schema.get("properties") if isinstance(schema, dict) else None
        arguments: dict[str, Any] = {}
        at = head.end()
        while at < len(body):
            found = self._PARAMETER.match(body, at)
            if found is None:
                return []
            kind = properties.get(found[1]) if isinstance(properties, dict) else None
            arguments[found[1]] = typed(found[2].removeprefix("\n").removesuffix("\n"), kind, schema)
            at = found.end()
        return [Call(head[1], json.dumps(arguments, ensure_ascii=False))]


class LlamaParser(_JsonParser):
    """Llama 3.x: a JSON object, after <|python_tag|> or by itself; its first key separates it from other JSON early. By
    itself it is a call if it has arguments or names a tool: other objects have names, too."""

    _OPEN = re.compile(r"(?:<\|python_tag\|>)?\s*")
    _FIRST = re.compile(r'\{\s*(?:"(\w*)("?))?')
    _FIRST_KEYS = ("name", "function", "arguments", "parameters", "type", "id")

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        opened = self._OPEN.match(text)
        assert opened is not None
        start = opened.end()
        if start == len(text):
            return None
        first = self._FIRST.match(text, start)
        if first is None:
            return ParsedCalls([], start)
        key, whole = first[1] or "", first[2]
        if not whole:
            may_be = first.end() == len(text) and any(known.startswith(key) for known in self._FIRST_KEYS)
            return None if may_be else ParsedCalls([], start + 1)
        if key not in self._FIRST_KEYS:
            return ParsedCalls([], start + 1)
        end = self._json_end(text, start)
        if not isinstance(end, int):
            return end
        calls = json_calls(text[start:end])
        sure = start > 0 or all(call.name in self._schemas or call.arguments != "{}" for call in calls)
        return ParsedCalls(calls if sure else [], end)


class MistralParser(_JsonParser):
    """Mistral: [TOOL_CALLS] and a list of objects, or in newer models a name, [ARGS] and the arguments."""

    _MARK = "[TOOL_CALLS]"
    _HEAD = re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\s*[\w-]*)?(?:\[ARGS\])?\s*)?")
    _INNER = ("[CALL_ID]", "[ARGS]")

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        head = self._HEAD.match(text, len(self._MARK))
        assert head is not None
        start, name = head.end(), head["name"]
        rest = text[start : start + len("[CALL_ID]")]
        if not rest or (name and any(inner.startswith(rest) for inner in self._INNER)):
            return None
        if rest[0] != "{" and (name or rest[0] != "["):
            return ParsedCalls([], start)
        end = self._json_end(text, start)
        if not isinstance(end, int):
            return end
        if not name:
            return ParsedCalls(json_calls(text[start:end]), end)
        try:
            call = call_with(name, text[start:end])
        except (ValueError, RecursionError):
            call = None
        return ParsedCalls([call] if call else [], end)
