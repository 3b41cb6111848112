"""Cards: what views show as JSON. `views.toml` has a schema of each, which OpenAPI shows too."""

from typing import Any

from miniserve.config import tables

SCHEMAS = tables("monitor/views.toml")
Card = dict[str, Any]


def card(kind: str, /, *sources: object, **own: Any) -> Card:
    """A `kind` of views.toml: each property that is not among `own` is that of its name in the first of the sources
    that has it."""

    def value(name: str) -> Any:
        return own[name] if name in own else next(getattr(source, name) for source in sources if hasattr(source, name))

    return {name: value(name) for name in SCHEMAS[kind]["properties"]}
