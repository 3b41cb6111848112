"""Tool calls in JSON: which calls a text describes, and which types a schema allows.

Nothing is ever repaired or guessed: what is not in order is no call.
"""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import msgspec

MAX_PARTS = 64
"""How many alternatives and references of a schema are looked at for its types: they may go round in circles."""

Schemas = Mapping[str, Any]
"""By the name of a tool: the JSON schema of its parameters."""


class Call(NamedTuple):
    """A tool's name and its arguments: the JSON text of an object."""

    name: str
    arguments: str


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
    return call_with(name, bytes(arguments or b"{}").decode()) if name else None


def call_with(name: str, text: str) -> Call | None:
    """The call with the arguments `text`, kept as the model wrote them; a JSON string is taken for the text inside.
    None if they are no object. Raises `ValueError` or `RecursionError` for what is no JSON."""
    value = msgspec.json.decode(text)
    if isinstance(value, str):
        text, value = value, msgspec.json.decode(value)
    if value is None:
        text, value = "{}", {}
    return Call(name, text.strip()) if isinstance(value, dict) else None


# --- types ----------------------------------------------------------------------------------------------------------


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
