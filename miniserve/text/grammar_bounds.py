"""Bounds of grammars. llguidance bounds most of what a grammar may cost: expressions are derived as they are needed,
with so much fuel for each token, and rows of its parser hold so many items. What it does not bound is refused here
before it is compiled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from miniserve.sampling_params import Grammar

MAX_CHARS = {"json_schema": 65536, "regex": 4096, "lark": 2**20}
"""Most characters of a grammar. Those of Lark are ours where tools are forced, and hold a schema for each tool."""
MAX_RULE_CHARS = 131072
"""Most characters of a Lark grammar beside the schemas in it: Qwen3-Coder's calls have a rule for each argument."""
MAX_DEPTH = 64
"""How deep the objects and lists of a schema may be nested."""
MAX_PROPERTIES = 1000
"""Most properties of a schema, in all of its objects together."""
MAX_PATTERN_CHARS = 1024
MAX_COMBINED_PATTERNS = 8
"""Most different patterns of a schema whose strings may have to match several of them: the library's search for a text
that does is bounded by nothing, and doubles with each."""
MAX_PATTERN_PROPERTIES = 32
"""Most `patternProperties` of a schema. Each pair of them is shown to exclude each other: 600 take 70 s, 32 some 10 ms,
and there may be a schema for each of many tools."""
MAX_MULTIPLE = 10_000
"""The least common multiple of all `multipleOf`: remainders are states, and 100,003 of them take 0.3 s."""
_JSON = re.compile(r"%json\s*")
_PLAIN = re.compile(r'(?://|#)[^\n]*|"(?:\\.|[^"\\])*"?|/(?:\\.|[^/\\])+/?', re.DOTALL)
"""Comments, strings and expressions of Lark, as llguidance reads them. What is not closed it refuses; looking for the
end of such again and again would take more than a second."""


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message says why, in a sentence."""


def check_bounds(grammar: Grammar) -> None:
    """Raises `GrammarError` for a grammar that is too large to be tried."""
    text, most = grammar.text, MAX_CHARS[grammar.kind]
    if len(text) > most:
        raise GrammarError(f"it has {len(text)} characters, and at most {most} are allowed.")
    if grammar.kind == "json_schema":
        _check_schema(_parsed(text, 0)[0])
    elif grammar.kind == "lark":
        rules, end = "", 0
        while found := _JSON.search(text, end):
            rules += text[end : found.start()] + " "
            schema, end = _parsed(text, found.end())
            _check_schema(schema)
        rules += text[end:]
        if len(rules) > MAX_RULE_CHARS:
            raise GrammarError(f"its rules have {len(rules)} characters, and at most {MAX_RULE_CHARS} are allowed.")
        if re.search("[&~]", _PLAIN.sub("", rules)):
            # Whether such a term matches anything at all may take for ever to find out.
            raise GrammarError("the operators & and ~ are not allowed: write the expression without them.")


def _parsed(text: str, start: int) -> tuple[Any, int]:
    """The JSON value in `text` from `start` on, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"a schema is not valid JSON: {error}.") from error


def _check_schema(schema: Any) -> None:
    """Raises `GrammarError` for what llguidance's own limits do not stop in time."""
    properties, named_by_pattern, multiple = 0, 0, 1
    different: set[str] = set()
    combined = False
    for depth, value in _walk(schema):
        if depth > MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {MAX_DEPTH} levels deep.")
        if not isinstance(value, dict):
            continue
        if isinstance(found := value.get("properties"), dict):
            properties += len(found)
        patterns = [*found] if isinstance(found := value.get("patternProperties"), dict) else []
        named_by_pattern += len(patterns)
        if isinstance(pattern := value.get("pattern"), str):
            patterns.append(pattern)
        different |= set(patterns)
        # Beside a pattern, those of a reference or of alternatives count, too.
        combined |= "allOf" in value or ("pattern" in value and not value.keys().isdisjoint(("$ref", "anyOf", "oneOf")))
        if any(len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
            raise GrammarError(f"a pattern has more than {MAX_PATTERN_CHARS} characters.")
        factor = value.get("multipleOf")
        if isinstance(factor, int | float) and factor > 0:
            digits = Decimal(str(factor)).normalize().as_tuple().digits
            multiple = math.lcm(multiple, int("".join(map(str, digits))))
            if multiple > MAX_MULTIPLE:
                raise GrammarError(f"the least common multiple of all `multipleOf` is above {MAX_MULTIPLE}.")
    if combined and len(different) > MAX_COMBINED_PATTERNS:
        raise GrammarError(
            f"it combines patterns, as `allOf` does, and has {len(different)} of them: at most {MAX_COMBINED_PATTERNS} "
            "are allowed then."
        )
    if named_by_pattern > MAX_PATTERN_PROPERTIES:
        raise GrammarError(
            f"the schema has {named_by_pattern} `patternProperties`, and at most {MAX_PATTERN_PROPERTIES} are allowed."
        )
    if properties > MAX_PROPERTIES:
        raise GrammarError(f"the schema has {properties} properties, and at most {MAX_PROPERTIES} are allowed.")


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    """All objects and lists in a JSON value with how deep they are, level by level."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [item for item in level if isinstance(item, dict | list)]
        for item in level:
            yield depth, item
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
