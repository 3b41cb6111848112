"""JSON schemas: an ordinary one, a deep one, and random ones with short outputs, made of what agents' schemas are made
of, nested and mixed, some of it odd."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

NAMES = (
    "name",
    "id",
    "value",
    "items",
    'quo"te',
    "back\\slash",
    "naïve",
    "名前",
    "with space",
    "😀",
    "",
    "a/b~c",
    "$x",
)
PATTERNS = ("^[a-z]{1,8}$", "^\\d{3}-\\d{4}$", "^(yes|no)$", "^[A-Z][a-z]{0,5}( [A-Z][a-z]{0,5})?$", "^a?b*c$")
ENUM = ("red", "größer", 'a "b"', 1, 2.5, None, True, [1, "x"], {"k": []}, "日本")
FORMATS = ("uuid", "ipv4")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


def random_schema(pick: random.Random) -> dict[str, Any]:
    """A schema with a few levels; some have definitions that refer to themselves."""
    defs = {"leaf": _leaf(pick), "tree": _tree(pick)} if pick.random() < 0.3 else {}
    schema = _schema(pick, 3, [*defs])
    return {**schema, "$defs": defs} if defs else schema


def _schema(pick: random.Random, depth: int, defs: list[str]) -> dict[str, Any]:
    kinds: list[Callable[[], dict[str, Any]]] = [lambda: _leaf(pick)]
    if depth:
        kinds += [
            lambda: _object(pick, depth, defs),
            lambda: _object(pick, depth, defs),
            lambda: _array(pick, depth, defs),
            lambda: {"anyOf": [_schema(pick, depth - 1, defs) for _ in range(pick.randint(1, 3))]},
        ]
    if defs:
        kinds.append(lambda: {"$ref": f"#/$defs/{pick.choice(defs)}"})
    return pick.choice(kinds)()


def _object(pick: random.Random, depth: int, defs: list[str]) -> dict[str, Any]:
    names = pick.sample(NAMES, pick.randint(0, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(pick, depth - 1, defs) for name in names},
        "required": [name for name in names if pick.random() < 0.6],
        "additionalProperties": False,
    }
    if pick.random() < 0.03:  # names of any length
        schema["additionalProperties"] = {"type": "integer"}
    if pick.random() < 0.2:
        schema["title"] = "A thing"
        schema["description"] = "Says nothing to a parser."
    return schema


def _array(pick: random.Random, depth: int, defs: list[str]) -> dict[str, Any]:
    least = pick.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + pick.randint(0, 3)}
    if schema["maxItems"] and pick.random() < 0.2:
        schema["prefixItems"] = [_schema(pick, depth - 1, defs) for _ in range(schema["maxItems"])]
    schema["items"] = _schema(pick, depth - 1, defs)
    return schema


def _tree(pick: random.Random) -> dict[str, Any]:
    """Refers to itself, with an end in sight."""
    return {
        "type": "object",
        "properties": {
            "label": {"enum": ["a", "b"]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": pick.randint(1, 2)},
        },
        "required": ["label"],
        "additionalProperties": False,
    }


def _leaf(pick: random.Random) -> dict[str, Any]:
    low, least = pick.randint(-1000, 1000), pick.randint(0, 4)
    leaves: list[dict[str, Any]] = [
        {"type": "string", "minLength": least, "maxLength": least + pick.randint(0, 8)},
        {"type": "string", "pattern": pick.choice(PATTERNS)},
        {"type": "string", "format": pick.choice(FORMATS)},
        {"type": "integer", "minimum": low, "maximum": low + pick.randint(0, 5000)},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 10**6, "multipleOf": pick.choice((2, 5, 7, 60))},
        {"type": "number", "minimum": low / 8, "maximum": low / 8 + pick.randint(1, 100)},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        {
            "enum": pick.sample(
                ["red", "größer", 'a "b"', 1, 2.5, None, True, [1, "x"], {"k": []}, "日本"], pick.randint(1, 5)
            )
        },
        {"const": pick.choice(["fixed", 42, None, {"deep": [1, 2, {"x": "y"}]}])},
    ]
    return pick.choice(leaves)
