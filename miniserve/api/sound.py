"""What text and JSON of clients must be for anything to work with it."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100
"""How deep free-form JSON may be nested: templates and serializers recurse into it."""


def valid_unicode(text: str) -> str:
    """`text`. Raises `ValueError` if it holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"This is not valid Unicode: character {error.start} is half of a surrogate pair without the other half"
        ) from error
    return text


def sound_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value`. Raises `ValueError` for what templates cannot work with. Goes level by level, and stops at the first
    that is too deep."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        items = [item for outer in level for item in outer]
        items += [item for outer in level if isinstance(outer, dict) for item in outer.values()]
        for item in items:
            if isinstance(item, str):
                valid_unicode(item)
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(f"This is nested too deeply: use at most {MAX_DEPTH} levels of objects and lists")
