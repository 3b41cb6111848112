"""JSON schemas: the one reader of them. What a schema says of a value that is written as text, and what of it a grammar
can hold.

llguidance knows most of JSON Schema. What it does not know is left out, so that the grammar allows more, and named.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice, product
from typing import Any
from urllib.parse import unquote

import msgspec
from llguidance import LLMatcher, grammar_from

from miniserve.config import tables

MAX_WAYS = 64
"""How many ways to fit a schema are looked at: those of `allOf` multiply."""
MAX_DEPTH = 64
"""So far references and parts of parts are followed; they may go round in circles."""

TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
TYPES = frozenset(("null", *TYPE_NAMES.values()))
KEYWORDS = tables("text/schemas.toml")
BOUNDS, PARTS, UNIONS, UNHELD = (frozenset(KEYWORDS[name]) for name in ("bounds", "parts", "unions", "unheld"))
_KEPT = BOUNDS | PARTS | UNIONS | {*KEYWORDS["others"]}


def says(key: str, value: Any) -> bool:
    """Whether a keyword with this value says anything. Clients write null where they mean nothing."""
    return value is not None and not any(key == idle and value is nothing for idle, nothing in KEYWORDS["idle"])


def referred(reference: Any, root: Any) -> Any:
    """What a reference inside of `root` is about; None if nothing is there."""
    base, _, pointer = str(reference).partition("#")
    found = root if base in ("", root.get("$id") if isinstance(root, dict) else "") else None
    if pointer and not pointer.startswith("/"):
        return None
    for key in unquote(pointer).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdecimal() and len(key) < 6 and int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, dict) else None
    return found


Way = list[dict[str, Any]]
"""The parts of a schema that all have to hold for one of the ways to fit it: itself, and what it refers to."""


def ways(schema: Any, root: Any) -> list[Way]:
    """The ways to fit `schema`, a part of `root`; none of them has to exclude another. The first `MAX_WAYS`."""
    known: dict[int, list[dict[int, dict[str, Any]]]] = {}

    def found(part: Any, depth: int) -> list[dict[int, dict[str, Any]]]:
        if not isinstance(part, dict) or depth > MAX_DEPTH:
            return [] if part is False else [{}]
        if id(part) not in known:
            known[id(part)] = [{}]  # a circle says nothing
            mine = [{id(part): part}]
            for choices in _choices(part, root):
                more = [way for choice in choices for way in found(choice, depth + 1)]
                mine = [one | other for one, other in islice(product(mine, more), MAX_WAYS)]
            known[id(part)] = mine
        return known[id(part)]

    return [list(way.values()) for way in found(schema, 0)]


def _choices(part: dict[str, Any], root: Any) -> Iterator[list[Any]]:
    if "$ref" in part:
        yield [referred(part["$ref"], root)]
    for key in ("allOf", *UNIONS):
        if isinstance(inner := part.get(key), list) and inner:
            yield from [inner] if key in UNIONS else ([one] for one in inner)


def type_of(value: Any) -> str:
    return TYPE_NAMES.get(type(value), "null")


def types(way: Way) -> frozenset[str]:
    """The types that a way allows; all if it says nothing. What has properties or items without a type means one."""
    allowed = TYPES
    for part in way:
        kind = part.get("type") or [kind for key, kind in (("properties", "object"), ("items", "array")) if key in part]
        if own := {item for item in (kind if isinstance(kind, list) else [kind]) if isinstance(item, str)}:
            allowed &= own | ({"integer"} if "number" in own else set())
        if (listed := _listed(part)) is not None:
            allowed &= {type_of(value) for value in listed}
    return allowed


def values(way: Way) -> list[Any] | None:
    """The values that a way allows, if it names them."""
    listed = next((found for part in way if (found := _listed(part)) is not None), None)
    allowed = types(way)
    return None if listed is None else [value for value in listed if type_of(value) in allowed]


def _listed(part: dict[str, Any]) -> list[Any] | None:
    values = [part["const"]] if "const" in part else part.get("enum")
    return values if isinstance(values, list) else None


def properties(way: Way) -> tuple[dict[str, Any], list[str]]:
    """The properties that a way names, each with its schema, and which of them it requires."""
    found: dict[str, Any] = {}
    for part in way:
        for key, kind in (part.get("properties") or {}).items() if isinstance(part.get("properties"), dict) else ():
            found[key] = {"allOf": [found[key], kind]} if key in found else kind
    required = [key for part in way if isinstance(part.get("required"), list) for key in part["required"]]
    return found, [key for key in required if isinstance(key, str)]


def argument(schema: Any, key: str) -> Any:
    """What the schema of a function's arguments says of the one called `key`; None if nothing."""
    kinds = []
    for way in ways(schema, schema):
        named, more = properties(way)[0], [part.get("additionalProperties") for part in way]
        kinds += [named[key]] if key in named else [kind for kind in more if isinstance(kind, dict)]
    return {"anyOf": kinds} if kinds else None


def spelled(value: Any) -> str:
    """A value as it is written without quotes: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def typed(text: str, schema: Any, root: Any = None) -> Any:
    """What `text` stands for, by its schema, a part of `root`: a value that the schema names, JSON where its type is
    among those that are allowed, or else the text itself, as where the schema says nothing."""
    found = ways(schema, root)
    for value in (value for way in found for value in values(way) or ()):
        if spelled(value) == text:
            return value
    free = [way for way in found if values(way) is None]
    allowed = frozenset().union(*map(types, free or found))
    if not allowed or allowed in (TYPES, {"string"}):
        return text
    word = text if "string" in allowed else {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:  # these words are Python's, which models mix up
        value = msgspec.json.decode(word)
        json.dumps(value)
    except (ValueError, RecursionError):
        return text
    return text if "string" in allowed and type_of(value) not in allowed else value


def held(schema: Any, root: Any, relaxed: set[str] | None) -> dict[str, Any]:
    """`schema`, a part of `root`, as llguidance knows to hold it, with all that it refers to. What it cannot hold is
    left out and named in `relaxed`; if that is None it stays, to be refused."""
    pointers: list[str] = []
    numbers: dict[str, int] = {}

    def part(node: Any, depth: int = 0) -> Any:
        if node is None or not isinstance(node, dict) or depth > MAX_DEPTH:
            return True if node is None else node
        out: dict[str, Any] = {}
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str) and _circles(value, root):
                continue  # it says nothing
            if key == "const" or (key in _KEPT | UNHELD and says(key, value)):
                out[key] = parts(key, value, depth + 1)
        for key in [key for key in out if not _holds(key, out)]:
            if relax(key):
                del out[key]
                if key == "patternProperties":
                    out.pop("additionalProperties", None)  # it is about what these did not name
        required, listed = out.get("required"), out.get("properties")
        if out.get("additionalProperties") is False and isinstance(required, list) and "patternProperties" not in out:
            known = [key for key in required if isinstance(key, str) and isinstance(listed, dict) and key in listed]
            if known != required and relax("required"):
                out["required"] = known
        return out

    def parts(key: str, value: Any, depth: int) -> Any:
        if key == "$ref" and referred(value, root) is not None:
            if value not in numbers:
                numbers[value] = len(pointers)
                pointers.append(value)
            return f"#/$defs/r{numbers[value]}"
        if key not in PARTS | UNIONS | {"allOf"}:
            return value
        if isinstance(value, list):
            return [part(inner, depth) for inner in value]
        if key in ("properties", "patternProperties") and isinstance(value, dict):
            return {name: part(inner, depth) for name, inner in value.items()}
        return part(value, depth)

    def relax(key: str) -> bool:
        if relaxed is not None:
            relaxed.add(key)
        return relaxed is not None

    made = part(schema)
    made = made if isinstance(made, dict) else {"allOf": [made]}
    # They grow meanwhile.
    defs = {f"r{number}": part(referred(pointer, root)) for number, pointer in enumerate(pointers)}
    return {**made, "$defs": defs} if defs else made


def _circles(pointer: str, root: Any) -> bool:
    """Whether a reference leads back to itself before it has come to a value's parts."""
    found = [pointer]
    for one in islice(found, MAX_WAYS):  # which grow meanwhile
        node = referred(one, root)
        every = node.get("allOf") if isinstance(node, dict) else None
        parts = [node, *every] if isinstance(every, list) else [node]
        inner = [part.get("$ref") for part in parts if isinstance(part, dict)]
        if pointer in inner:
            return True
        found += {ref for ref in inner if isinstance(ref, str)} - set(found)
    return False


def _holds(key: str, node: dict[str, Any]) -> bool:
    value, kind = node[key], node.get("type", "string")
    match key:
        case "pattern" | "format":
            return "string" not in str(kind) or not isinstance(value, str) or _known(key, value)
        case "patternProperties":
            return not isinstance(value, dict) or all(_known("pattern", name) for name in value)
        case "required":
            return isinstance(value, list)
    return key not in UNHELD


@lru_cache(1024)
def _known(key: str, value: str) -> bool:
    """Whether llguidance can hold text to this pattern or format. Too long ones are refused elsewhere."""
    grammar = grammar_from("json_schema", json.dumps({"type": "string", key: value}))
    return len(value) > 1024 or not LLMatcher.validate_grammar(grammar)
