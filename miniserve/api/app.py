"""The HTTP API: its routes, and what OpenAPI says of them."""

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware

from miniserve import __version__
from miniserve.api import dashboard, errors
from miniserve.api.messages.answers import MessageOut, ModelCard, ModelCards
from miniserve.api.middleware import ApiKey, BodyLimit, Edge
from miniserve.api.openai import answers
from miniserve.api.responses.answers import ResponseOut
from miniserve.api.responses.routes import ResponsesRoutes
from miniserve.api.service import Service
from miniserve.api.streaming import event_stream
from miniserve.config import ServeConfig
from miniserve.dispatcher import Dispatcher, EngineError
from miniserve.monitor.events import Feed
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer

EXPOSED = ["X-Request-Id", "X-Ignored-Parameters", "Retry-After"]
"""Headers of answers that a browser shows to scripts of other origins."""
Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {
    "4XX": {"model": errors.ErrorBody, "description": "The request is at fault; the message says what to change."},
    "500": {"model": errors.ErrorBody, "description": "The server failed."},
    "503": {"model": errors.ErrorBody, "description": "The server is full or not well: try again after Retry-After."},
}
ANTHROPIC_ERRORS: Responses = {
    status: {**documented, "model": errors.AnthropicErrorBody} for status, documented in ERRORS.items()
}
STREAM = event_stream(data={"type": "string", "description": "A chunk or an error as JSON; the last one is [DONE]."})
NAMED_STREAM = event_stream(event={"type": "string"}, data={"type": "string", "description": "As JSON, with a `type`."})


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
    middleware.append(Middleware(ServerErrorMiddleware, handler=errors.answer_unexpected))
    app = FastAPI(
        title="miniserve", version=__version__, middleware=middleware, responses=ERRORS, redirect_slashes=False
    )
    errors.install(app)
    app.post("/v1/chat/completions", responses=_ok(answers.ChatCompletion, STREAM))(service.chat_completions)
    app.post("/v1/completions", responses=_ok(answers.Completion, STREAM))(service.completions)
    _add_responses(app, ResponsesRoutes(service))
    app.post("/v1/messages", responses=ANTHROPIC_ERRORS | _ok(MessageOut, NAMED_STREAM))(service.messages)
    app.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS)(service.count_tokens)
    app.post("/tokenize")(service.tokenize)
    app.post("/detokenize")(service.detokenize)
    _add_model_and_health(app, client, service, config.engine.model)
    dashboard.add_views(app, client, feed, service.metrics, service.doctor)
    dashboard.add_page(app)
    return app


def _add_responses(app: FastAPI, routes: ResponsesRoutes) -> None:
    app.post("/v1/responses", responses=_ok(ResponseOut, NAMED_STREAM))(routes.create)
    app.post("/v1/responses/input_tokens")(routes.count_input)
    app.get("/v1/responses/{response}", responses=_ok(ResponseOut))(routes.retrieve)
    app.delete("/v1/responses/{response}")(routes.delete)
    app.get("/v1/responses/{response}/input_items")(routes.list_input)
    conversations = routes.conversations
    app.post("/v1/conversations")(conversations.create)
    app.get("/v1/conversations/{conversation}")(conversations.retrieve)
    app.post("/v1/conversations/{conversation}")(conversations.update)
    app.delete("/v1/conversations/{conversation}")(conversations.delete)
    app.get("/v1/conversations/{conversation}/items")(conversations.list_items)
    app.post("/v1/conversations/{conversation}/items")(conversations.add_items)
    app.get("/v1/conversations/{conversation}/items/{item}")(conversations.retrieve_item)
    app.delete("/v1/conversations/{conversation}/items/{item}")(conversations.delete_item)


def _ok(answer: Any, stream: dict[str, Any] | None = None) -> Responses:
    """OpenAPI's account of an endpoint that builds its answers itself."""
    return {200: {"model": answer, **({"content": stream} if stream else {})}}


def _add_model_and_health(app: FastAPI, client: Dispatcher, service: Service, root: str) -> None:
    created, names = int(time.time()), service.names

    def card(name: str) -> answers.Model:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "miniserve",
            "root": root,
            "max_model_len": client.max_model_len,
            "vocab_size": client.vocab_size,
        }

    def anthropic_card(name: str) -> ModelCard:
        day = datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"type": "model", "id": name, "display_name": name, "created_at": day}

    @app.get("/v1/models")
    async def models(request: Request) -> answers.ModelList | ModelCards:
        """The names of the one model that is served; in the Anthropic API's shape for a request with the header
        `anthropic-version`."""
        if errors.is_anthropic(request.scope, request.scope["path"]):
            data = [anthropic_card(name) for name in names]
            return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{model:path}")  # names may hold slashes
    async def retrieve_model(request: Request, model: str) -> answers.Model | ModelCard:
        """One of these names."""
        service.check_model(model)
        return anthropic_card(model) if errors.is_anthropic(request.scope, request.scope["path"]) else card(model)

    @app.get("/health")
    async def health() -> answers.HealthStatus:
        """Whether the engine can serve; needs no API key."""
        if not client.healthy:
            raise EngineError(client.unhealthy_reason)
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> answers.Version:
        """The version of miniserve."""
        return {"version": __version__}
