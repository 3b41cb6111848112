"""The HTTP API: its parts, and what is around them."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware

from miniserve import __version__
from miniserve.api import dashboard, errors
from miniserve.api.middleware import ApiKey, BodyLimit, Edge
from miniserve.api.openapi import App, problems
from miniserve.api.responses.routes import ResponsesRoutes
from miniserve.api.service import Service
from miniserve.config import ServeConfig
from miniserve.dispatcher import Dispatcher
from miniserve.monitor.events import Feed
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer

EXPOSED = ["X-Request-Id", "X-Ignored-Parameters", "Retry-After"]
"""Headers of answers that a browser shows to scripts of other origins."""


def create_app(
    config: ServeConfig,
    client: Dispatcher,
    feed: Feed,
    tokenizer: Tokenizer,
    generation_defaults: dict[str, Any],
    compiler: Compiler,
) -> FastAPI:
    """The API as an ASGI app.

    `client` need not have started yet; `feed` gives the events of its scheduler. `generation_defaults` is the model's
    generation_config.json, or empty for neutral sampling. `compiler` checks grammars. Raises `ConfigError` for the name
    of a parser that does not exist.
    """
    service = Service(config, client, tokenizer, generation_defaults, compiler)
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
    responses = ResponsesRoutes(service)
    views = dashboard.Views(client, feed, service.metrics, service.doctor)
    parts = {"service": service, "responses": responses, "conversations": responses.conversations, "views": views}
    app.add_routes(parts)
    dashboard.add_page(app)
    return app
