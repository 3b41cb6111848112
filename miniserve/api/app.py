"""The HTTP API: its parts, their routes (`routes.toml`), what OpenAPI says of them, and what is around them.

Endpoints build their answers themselves. Tests hold these against the JSON schemas in `answers.toml` and
`monitor/views.toml`.
"""

from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import Response

from miniserve import __version__
from miniserve.api import errors
from miniserve.api.dashboard import Views
from miniserve.api.middleware import ApiKey, BodyLimit, Edge
from miniserve.api.responses.routes import ResponsesRoutes
from miniserve.api.service import Service
from miniserve.config import tables
from miniserve.monitor.events import Feed
from miniserve.monitor.views import SCHEMAS

EXPOSED = ["X-Request-Id", "X-Ignored-Parameters", "Retry-After"]
"""Headers of answers that a browser shows to scripts of other origins."""
ROUTES = tables("api/routes.toml")
ANSWERS = tables("api/answers.toml") | SCHEMAS


def create_app(service: Service, feed: Feed) -> FastAPI:
    """The API as an ASGI app; `feed` gives the events of the scheduler."""
    config = service.config
    middleware = [Middleware(Edge, config.root_path, service.metrics)]
    if config.allowed_origins:  # before the key, which preflights do not carry
        middleware.append(Middleware(CORSMiddleware, config.allowed_origins, ["*"], ["*"], expose_headers=EXPOSED))
    if config.api_key is not None:
        middleware.append(Middleware(ApiKey, config.api_key))
    middleware.append(Middleware(BodyLimit, config.max_body_bytes))
    # Starlette has one of these outside of all others, where answers get neither an id nor what browsers want.
    middleware.append(Middleware(ServerErrorMiddleware, handler=errors.answer))
    app = App(
        title="miniserve",
        version=__version__,
        middleware=middleware,
        exception_handlers=dict.fromkeys(errors.FORESEEN, errors.answer),
        responses=problems("ErrorBody"),
        redirect_slashes=False,
    )
    responses, views = ResponsesRoutes(service), Views(service, feed)
    app.add_routes(service=service, responses=responses, conversations=responses.conversations, views=views)
    return app


class App(FastAPI):
    """An app whose OpenAPI document holds the schemas of all answers."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for name, table in ANSWERS.items():
            schema = {"type": "object", **table}
            optional = schema.pop("optional", [])
            schema["required"] = [key for key in table["properties"] if key not in optional]
            document["components"]["schemas"][name] = schema
        return document

    def add_routes(self, **parts: object) -> None:
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
                handler, shown = getattr(parts[part], row["run"]), "hidden" not in row
                how: dict[str, Any] = {"methods": [method], "responses": responses, "include_in_schema": shown}
                self.add_api_route(path, handler, response_class=Response, **how)


def problems(error: str) -> dict[int | str, dict[str, Any]]:
    """The answers to requests that fail, in the shape `error`."""
    return {status: {"description": why, "content": _json(error)} for status, why in errors.TABLES["problems"].items()}


def _json(*names: str) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(*names)}}


def _schema(*names: str) -> dict[str, Any]:
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0]
