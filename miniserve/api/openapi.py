"""What OpenAPI says of answers: endpoints build these themselves, and `answers.toml` has a JSON schema of each, and of
the events of streams; `monitor/views.toml` has those of views.

Tests hold all answers against these schemas.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from miniserve.api import errors
from miniserve.config import tables
from miniserve.monitor.views import SCHEMAS

TABLES = tables("api/answers.toml") | SCHEMAS
Handler = Callable[..., Awaitable[Response]]


class App(FastAPI):
    """An app whose OpenAPI document holds the schemas of all answers."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for name, table in TABLES.items():
            schema = {"type": "object", **table}
            optional = schema.pop("optional", [])
            schema["required"] = [key for key in table["properties"] if key not in optional]
            document["components"]["schemas"][name] = schema
        return document

    def endpoint(
        self, method: str, path: str, handler: Handler, *answers: str, stream: str = "", error: str = "ErrorBody"
    ) -> None:
        """Add a route that answers with one of `answers`, with a stream of events like `stream`, or with an `error`."""
        content = _json(*answers) if answers else {}
        if stream:
            content["text/event-stream"] = {"itemSchema": _schema(stream)}
        responses = {200: {"content": content}, **problems(error)}
        self.add_api_route(path, handler, methods=[method], responses=responses, response_class=Response)


def problems(error: str) -> dict[int | str, dict[str, Any]]:
    """The answers to requests that fail, in the shape `error`."""
    return {status: {"description": why, "content": _json(error)} for status, why in errors.TABLES["problems"].items()}


def _json(*names: str) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(*names)}}


def _schema(*names: str) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0]
