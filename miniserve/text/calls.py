"""Tool calls as models write them: recognising one in text that grows, and its name and arguments.

An attempt is made at each place where a call may begin. It looks at every character once however the text arrives, and
ends by saying either what is called or that this is no call; nothing is ever repaired or guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import msgspec

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")
MAX_PARTS = 64
"""How many alternatives and references of a schema are looked at for its types: they may go round in circles."""
FIRST_KEYS = (*NAME_KEYS, *ARGUMENT_KEYS, "type", "id")

Schemas = Mapping[str, Any]
"""By the name of a tool: the JSON schema of its parameters."""


class Call(NamedTuple):
    """A tool's name and its arguments: the JSON text of an object."""

    name: str
    arguments: str


class Found(NamedTuple):
    """What an attempt has come to. Without `calls` the text up to `end` is no call."""

    calls: list[Call]
    end: int


class Attempt(Protocol):
    """Reads one place where a call may begin."""

    def read(self, text: str, final: bool) -> Found | None:
        """`text` begins there, and is longer each time; None until more of it is needed. `final`: no more will come."""


class JsonEnd:
    """Finds where the JSON object or list that begins at `at` ends, looking at each character once.

    `end` is behind it; `broken` says that `at` holds what stands in no JSON.
    """

    _STRING = re.compile(r'[^"\\]*')
    _OTHER = re.compile(r"[\s\w.,:+-]*")

    def __init__(self, at: int) -> None:
        self.at = at
        self.end: int | None = None
        self.broken = False
        self._depth = 0
        self._quoted = False

    def find(self, text: str) -> int | None:
        """The end, once it is there."""
        while self.end is None and not self.broken:
            passed = (self._STRING if self._quoted else self._OTHER).match(text, self.at)
            assert passed is not None  # both match nothing, too
            self.at = passed.end()
            if self.at == len(text):
                return None
            character = text[self.at]
            if character == "\\" and self._quoted:
                if self.at + 1 == len(text):
                    return None
                self.at += 1
            elif character == '"':
                self._quoted = not self._quoted
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            else:
                self.broken = True
                break
            self.at += 1
            if not self._depth:
                self.end = self.at
        return self.end


# --- JSON -----------------------------------------------------------------------------------------------------------


NOTHING = msgspec.Raw(b"")


class _Written(msgspec.Struct):
    """A call as an object; `function` is its name, or as in the OpenAI API another object that holds name and
    arguments."""

    name: str = ""
    function: msgspec.Raw = NOTHING
    arguments: msgspec.Raw = NOTHING
    parameters: msgspec.Raw = NOTHING


def json_calls(text: str) -> list[Call]:
    """The calls that a JSON object or a list of them describes; none if only one of them is not in order."""
    try:
        value = msgspec.json.decode(text)  # strict everywhere: what is passed on as raw text below is sound
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, dict) for entry in entries):
            return []
        written = msgspec.json.decode(text if isinstance(value, list) else f"[{text}]", type=list[_Written])
        calls = [_call(entry) for entry in written]
    except (ValueError, RecursionError):
        return []
    return [call for call in calls if call is not None] if None not in calls else []


def _call(written: _Written) -> Call | None:
    name, arguments = written.name, written.arguments or written.parameters
    if written.function:
        inner = msgspec.json.decode(written.function, type=str | _Written)
        if isinstance(inner, str):
            name = name or inner
        else:
            name, arguments = name or inner.name, arguments or inner.arguments or inner.parameters
    return _with_arguments(name, bytes(arguments or b"{}").decode()) if name else None


def _with_arguments(name: str, text: str) -> Call | None:
    """`text` is kept as the model wrote it, if it is an object's; one in a string is taken out of it."""
    value = msgspec.json.decode(text)
    if isinstance(value, str):
        text, value = value, msgspec.json.decode(value)
    if value is None:
        text, value = "{}", {}
    return Call(name, text.strip()) if isinstance(value, dict) else None


# --- <tool_call> ----------------------------------------------------------------------------------------------------


class TagAttempt:
    """Hermes, Qwen and SmolLM2: JSON, an object or a list, in <tool_call>; Qwen3-Coder: <function=...> in it, or alone.

    Inside of a JSON string the closing tag is a part of the string.
    """

    _OPEN = re.compile(r"(?:<tool_call>)?\s*")
    _CLOSE = "</tool_call>"
    _FUNCTION = "<function="
    _FUNCTION_END = re.compile(r"</function>")
    _HEAD = re.compile(r"<function=([^<>\s]+)>\s*")
    _PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._json: JsonEnd | None = None
        self._searched = 0

    def read(self, text: str, final: bool) -> Found | None:
        opened = self._OPEN.match(text)
        assert opened is not None
        start = opened.end()
        head = text[start : start + len(self._FUNCTION)]
        if head.startswith(("{", "[")):
            return self._read_json(text, start, final)
        if head == self._FUNCTION:
            return self._read_function(text, start, final)
        return None if self._FUNCTION.startswith(head) else Found([], start)

    def _read_json(self, text: str, start: int, final: bool) -> Found | None:
        self._json = self._json or JsonEnd(start)
        end = self._json.find(text)
        if end is None:
            return Found([], self._json.at) if self._json.broken else None
        close = self._closing(text, end, final)
        if close is None:
            return None
        return Found(json_calls(text[start:end]) if close else [], close or end)

    def _read_function(self, text: str, start: int, final: bool) -> Found | None:
        while (ended := self._FUNCTION_END.search(text, max(self._searched, start))) is not None:
            close = self._closing(text, ended.end(), final)
            if close is None:
                return None
            if close or not start:  # without <tool_call> before it, none need close it
                return Found(self._function(text[start : ended.start()]), close or ended.end())
            self._searched = ended.end()  # it stands in an argument
        self._searched = max(self._searched, len(text) - len("</function>") + 1)
        return None

    def _closing(self, text: str, end: int, final: bool) -> int | None:
        """Where the closing tag after `end` ends; 0 if something else stands there, None if that cannot be told yet.
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


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """An argument that is written without quotes, as what its schema, a part of `root`, says it is; text where it says
    nothing."""
    types = schema_types(schema, root)
    if not types or ("string" in types and not ("null" in types and text == "null")):
        return text
    word = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)  # Python's, which models mix up
    try:
        value = msgspec.json.decode(word)
        json.dumps(value)
    except (ValueError, RecursionError):
        return text
    return value


def schema_types(schema: Any, root: Any) -> set[str]:
    """The types that a schema, a part of `root`, allows as far as it says so."""
    types: set[str] = set()
    parts = [schema]
    for part in islice(parts, MAX_PARTS):  # which grow meanwhile
        if not isinstance(part, dict):
            continue
        kind, values = part.get("type"), part.get("enum")
        own = {item for item in (kind if isinstance(kind, list) else [kind]) if isinstance(item, str)}
        if not own and isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            own = {"string"}
        types |= own
        for union in ("anyOf", "oneOf", "allOf"):
            choices = part.get(union)
            parts += choices if isinstance(choices, list) else []
        if isinstance(reference := part.get("$ref"), str):
            parts.append(_referred(reference, root))
    return types


def _referred(reference: str, root: Any) -> Any:
    """What a reference inside of `root` is about; None if nothing is there."""
    found = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


# --- Llama, Mistral -------------------------------------------------------------------------------------------------


class LlamaAttempt:
    """Llama 3.x: a JSON object, after <|python_tag|> or by itself; its first key tells it from other JSON early. By
    itself it is a call if it has arguments or names a tool: other objects have names, too."""

    _OPEN = re.compile(r"(?:<\|python_tag\|>)?\s*")
    _FIRST = re.compile(r'\{\s*(?:"(\w*)("?))?')

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._json: JsonEnd | None = None

    def read(self, text: str, final: bool) -> Found | None:
        opened = self._OPEN.match(text)
        assert opened is not None
        start = opened.end()
        if start == len(text):
            return None
        first = self._FIRST.match(text, start)
        if first is None:
            return Found([], start)
        key, whole = first[1] or "", first[2]
        if not whole:
            may_be = first.end() == len(text) and any(known.startswith(key) for known in FIRST_KEYS)
            return None if may_be else Found([], start + 1)
        if key not in FIRST_KEYS:
            return Found([], start + 1)
        self._json = self._json or JsonEnd(start)
        end = self._json.find(text)
        if end is None:
            return Found([], self._json.at) if self._json.broken else None
        calls = json_calls(text[start:end])
        told = start > 0 or all(call.name in self._schemas or call.arguments != "{}" for call in calls)
        return Found(calls if told else [], end)


class MistralAttempt:
    """Mistral: [TOOL_CALLS] and a list of objects, or in newer models a name, [ARGS] and the arguments."""

    _MARK = "[TOOL_CALLS]"
    _HEAD = re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\s*[\w-]*)?(?:\[ARGS\])?\s*)?")
    _INNER = ("[CALL_ID]", "[ARGS]")

    def __init__(self, schemas: Schemas) -> None:
        self._json: JsonEnd | None = None

    def read(self, text: str, final: bool) -> Found | None:
        head = self._HEAD.match(text, len(self._MARK))
        assert head is not None
        start, name = head.end(), head["name"]
        rest = text[start : start + len("[CALL_ID]")]
        if not rest or (name and any(inner.startswith(rest) for inner in self._INNER)):
            return None
        if rest[0] != "{" and (name or rest[0] != "["):
            return Found([], start)
        self._json = self._json or JsonEnd(start)
        end = self._json.find(text)
        if end is None:
            return Found([], self._json.at) if self._json.broken else None
        if not name:
            return Found(json_calls(text[start:end]), end)
        try:
            call = _with_arguments(name, text[start:end])
        except (ValueError, RecursionError):
            call = None
        return Found([call] if call else [], end)
