"""The HTTP API: its routes, and what OpenAPI says of them."""

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import Response

from miniserve import __version__
from miniserve.api import dashboard, errors
from miniserve.api.middleware import ApiKey, BodyLimit, Edge
from miniserve.api.openapi import App, problems
from miniserve.api.responses.routes import ResponsesRoutes
from miniserve.api.service import Service
from miniserve.api.streaming import json_answer
from miniserve.config import ServeConfig
from miniserve.dispatcher import Dispatcher, EngineError
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
    app.endpoint("POST", "/v1/chat/completions", service.chat_completions, "ChatCompletion", stream="ChunkEvent")
    app.endpoint("POST", "/v1/completions", service.completions, "Completion", stream="ChunkEvent")
    _add_responses(app, ResponsesRoutes(service))
    error = "AnthropicErrorBody"
    app.endpoint("POST", "/v1/messages", service.messages, "MessageOut", stream="NamedEvent", error=error)
    app.endpoint("POST", "/v1/messages/count_tokens", service.count_tokens, "TokenCount", error=error)
    app.endpoint("POST", "/tokenize", service.tokenize, "Tokenized")
    app.endpoint("POST", "/detokenize", service.detokenize, "Detokenized")
    _add_model_and_health(app, client, service, config.engine.model)
    dashboard.add_views(app, client, feed, service.metrics, service.doctor)
    dashboard.add_page(app)
    return app


def _add_responses(app: App, routes: ResponsesRoutes) -> None:
    app.endpoint("POST", "/v1/responses", routes.create, "ResponseOut", stream="NamedEvent")
    app.endpoint("POST", "/v1/responses/input_tokens", routes.count_input, "InputTokens")
    app.endpoint("GET", "/v1/responses/{response}", routes.retrieve, "ResponseOut")
    app.endpoint("DELETE", "/v1/responses/{response}", routes.delete, "Deleted")
    app.endpoint("GET", "/v1/responses/{response}/input_items", routes.list_input, "ItemList")
    kept = routes.conversations
    app.endpoint("POST", "/v1/conversations", kept.create, "ConversationOut")
    app.endpoint("GET", "/v1/conversations/{conversation}", kept.retrieve, "ConversationOut")
    app.endpoint("POST", "/v1/conversations/{conversation}", kept.update, "ConversationOut")
    app.endpoint("DELETE", "/v1/conversations/{conversation}", kept.delete, "Deleted")
    app.endpoint("GET", "/v1/conversations/{conversation}/items", kept.list_items, "ItemList")
    app.endpoint("POST", "/v1/conversations/{conversation}/items", kept.add_items, "ItemList")
    app.endpoint("GET", "/v1/conversations/{conversation}/items/{item}", kept.retrieve_item, "Item")
    app.endpoint("DELETE", "/v1/conversations/{conversation}/items/{item}", kept.delete_item, "ConversationOut")


def _add_model_and_health(app: App, client: Dispatcher, service: Service, root: str) -> None:
    created, names = int(time.time()), service.names

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "miniserve",
            "root": root,
            "max_model_len": client.max_model_len,
            "vocab_size": client.vocab_size,
        }

    def anthropic_card(name: str) -> dict[str, Any]:
        day = datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"type": "model", "id": name, "display_name": name, "created_at": day}

    async def models(request: Request) -> Response:
        """The names of the one model that is served; in the Anthropic API's shape for a request with the header
        `anthropic-version`."""
        if errors.is_anthropic(request.scope):
            data = [anthropic_card(name) for name in names]
            return json_answer({"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]})
        return json_answer({"object": "list", "data": [card(name) for name in names]})

    async def retrieve_model(request: Request, model: str) -> Response:
        """One of these names."""
        service.check_model(model)
        return json_answer(anthropic_card(model) if errors.is_anthropic(request.scope) else card(model))

    async def health() -> Response:
        """Whether the engine can serve; needs no API key."""
        if not client.healthy:
            raise EngineError(client.unhealthy_reason)
        return json_answer({"status": "ok"})

    async def version() -> Response:
        """The version of miniserve."""
        return json_answer({"version": __version__})

    app.endpoint("GET", "/v1/models", models, "ModelList", "ModelCards")
    app.endpoint("GET", "/v1/models/{model:path}", retrieve_model, "Model", "ModelCard")  # names may hold slashes
    app.endpoint("GET", "/health", health, "HealthStatus")
    app.endpoint("GET", "/version", version, "Version")
