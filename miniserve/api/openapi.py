"""The routes of the API and what OpenAPI says of them: `routes.toml` has them all. Endpoints build their answers
themselves, and `answers.toml` has a JSON schema of each, and of the events of streams; `monitor/views.toml` has those
of views.

Tests hold all answers against these schemas.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from miniserve.api import errors
from miniserve.config import tables
from miniserve.monitor.views import SCHEMAS

ROUTES = tables("api/routes.toml")
TABLES = tables("api/answers.toml") | SCHEMAS


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

    def add_routes(self, parts: Mapping[str, object]) -> None:
        """Add all routes. The methods of `parts`, one for each table of routes.toml, are the handlers."""
        for part, routes in ROUTES.items():
            for route, row in routes.items():
                method, path = route.split()
                content = _json(*row["answers"]) if "answers" in row else {}
                if "stream" in row:
                    content["text/event-stream"] = {"itemSchema": _schema(row["stream"])}
                if "media" in row:
                    content[row["media"]] = {}
                responses = {200: {"content": content}, **problems(row.get("error", "ErrorBody"))}
                handler = getattr(parts[part], row["run"])
                self.add_api_route(path, handler, methods=[method], responses=responses, response_class=Response)


def problems(error: str) -> dict[int | str, dict[str, Any]]:
    """The answers to requests that fail, in the shape `error`."""
    return {status: {"description": why, "content": _json(error)} for status, why in errors.TABLES["problems"].items()}


def _json(*names: str) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(*names)}}


def _schema(*names: str) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0]
