"""Which calls a text in JSON describes. Nothing is ever repaired or guessed: what is not in order is no call."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

Schemas = Mapping[str, Any]
"""By the name of a tool: the JSON schema of its parameters."""


class Call(NamedTuple):
    """A tool's name and its arguments: the JSON text of an object."""

    name: str
    arguments: str


class Begun(NamedTuple):
    """A call that is still written: its name, and where in a text its arguments are valid JSON so far."""

    name: str
    start: int
    end: int


NOTHING = msgspec.Raw(b"")


class _Written(msgspec.Struct):
    """A call as an object; `function` is its name, or as in OpenAI's API an object with name and arguments."""

    name: str = ""
    function: msgspec.Raw = NOTHING
    arguments: msgspec.Raw = NOTHING
    parameters: msgspec.Raw = NOTHING


def json_calls(text: str, name: str = "") -> list[Call]:
    """The calls that a JSON object or list describes, or that of `name` with such arguments; none if one is wrong."""
    try:
        value = msgspec.json.decode(text)  # strict everywhere: what is passed on as raw text below is sound
        if name:
            return [_call_with(name, text)]
        written = msgspec.json.decode(text if isinstance(value, list) else f"[{text}]", type=list[_Written])
        return [_call(entry) for entry in written]
    except (ValueError, RecursionError):
        return []


def _call(written: _Written) -> Call:
    said = msgspec.json.decode(written.function or b'""', type=str | _Written)
    inner = _Written(said) if isinstance(said, str) else said
    name = written.name or inner.name
    arguments = written.arguments or written.parameters or inner.arguments or inner.parameters
    return _call_with(name, bytes(arguments or b"{}").decode())


def _call_with(name: str, text: str) -> Call:
    """The call with the arguments `text`, kept as the model wrote them; a JSON string is taken for the text inside.
    Raises `ValueError` or `RecursionError` for what is no object in JSON, and where there is no `name`."""
    value = msgspec.json.decode(text)
    if isinstance(value, str):
        text, value = value, msgspec.json.decode(value)
    if value is None:
        text, value = "{}", {}
    if not (name and isinstance(value, dict)):
        raise ValueError
    return Call(name, text.strip())


def sound(text: str) -> bool:
    """Whether `text` is JSON, strictly."""
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True
