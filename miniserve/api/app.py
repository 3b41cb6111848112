"""The HTTP API: its routes, and what OpenAPI says of them."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.middleware import Middleware
from starlette.responses import Response

from miniserve import __version__
from miniserve.api import errors
from miniserve.api.messages.answers import MessageOut, TokenCount
from miniserve.api.messages.errors import AnthropicErrorBody
from miniserve.api.messages.schemas import CountTokensRequest, MessagesRequest
from miniserve.api.middleware import ApiKey, BodyLimit, RequestId
from miniserve.api.openai.answers import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    Model,
    ModelList,
    Tokenized,
    Version,
)
from miniserve.api.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from miniserve.api.responses.schemas import ResponsesRequest
from miniserve.api.responses.types import ResponseDeleted, ResponseOut
from miniserve.api.service import Service, told
from miniserve.config import ServeConfig
from miniserve.dispatcher import Dispatcher, EngineError
from miniserve.monitor import page
from miniserve.monitor.conversation_views import (
    MOST_LISTED,
    ConversationDetail,
    ConversationList,
    conversation_detail,
    conversation_list,
)
from miniserve.monitor.events import Feed
from miniserve.monitor.metrics import CONTENT_TYPE
from miniserve.monitor.worker_views import WorkerList, worker_list
from miniserve.text.dialect import find_dialect
from miniserve.text.tokenizer import Tokenizer

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": errors.ErrorBody, "description": "The request is at fault; the message says what to change."},
    "500": {"model": errors.ErrorBody, "description": "The server failed."},
    "503": {"model": errors.ErrorBody, "description": "The server is full or not well: try again after Retry-After."},
}
ANTHROPIC_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": AnthropicErrorBody} for status, told in ERRORS.items()
}
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; the last one is [DONE]."}},
    "required": ["data"],
}
STREAM = {"text/event-stream": {"itemSchema": EVENT}}
NAMED_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "As JSON, with a `type`."}},
    "required": ["event", "data"],
}
NAMED_STREAM = {"text/event-stream": {"itemSchema": NAMED_EVENT}}
NEWS = {
    "type": "object",
    "properties": {
        "event": {"enum": ["start", "workers", "turns", "decision", "outcome", "lost"]},
        "data": {"type": "string", "description": "As JSON; of a decision or outcome, the line of the decision log."},
    },
    "required": ["event", "data"],
}


def create_app(
    config: ServeConfig, client: Dispatcher, feed: Feed, tokenizer: Tokenizer, generation_defaults: dict[str, Any]
) -> FastAPI:
    """The API as an ASGI app.

    `client` need not have started yet. `generation_defaults` is the model's generation_config.json, or empty for
    neutral sampling. Raises `ConfigError` for parsers that there are none of.
    """
    names = config.served_model_names or [config.engine.model]
    dialect = find_dialect(tokenizer, config.tool_call_parser, config.reasoning_parser)
    service = Service(client, tokenizer, dialect, names, generation_defaults)
    created = int(time.time())
    middleware = [Middleware(RequestId)]
    if config.api_key is not None:
        middleware.append(Middleware(ApiKey, config.api_key))
    middleware.append(Middleware(BodyLimit, config.max_body_bytes))
    app = FastAPI(
        title="miniserve", version=__version__, middleware=middleware, responses=ERRORS, redirect_slashes=False
    )
    errors.install(app)

    def card(name: str) -> Model:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "miniserve",
            "root": config.engine.model,
            "max_model_len": client.max_model_len,
            "vocab_size": client.vocab_size,
        }

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": STREAM}})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation; with `stream` true as server-sent events."""
        return await service.chat(request, body)

    @app.post("/v1/completions", responses={200: {"model": Completion, "content": STREAM}})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Go on with one or many texts; with `stream` true as server-sent events."""
        return await service.complete(request, body)

    @app.post("/v1/responses", responses={200: {"model": ResponseOut, "content": NAMED_STREAM}})
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation, or go on with one that is stored; with `stream` true as server-sent events."""
        return await service.respond(request, body)

    @app.get("/v1/responses/{response}", responses={200: {"model": ResponseOut}})
    async def retrieve_response(response: str, stream: bool = False) -> Response:
        """A response that is stored, as it was answered."""
        if stream:
            raise errors.ApiError(400, "A stored response comes whole: leave `stream` out.", param="stream")
        return service.stored_response(response)

    @app.delete("/v1/responses/{response}")
    async def delete_response(response: str) -> ResponseDeleted:
        """Forget a response; those that have gone on behind it stay as they are."""
        return service.delete_response(response)

    @app.post("/v1/messages", responses={**ANTHROPIC_ERRORS, 200: {"model": MessageOut, "content": NAMED_STREAM}})
    async def messages(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation as the Anthropic API does; with `stream` true as server-sent events."""
        return await service.message(request, body)

    @app.post("/v1/messages/count_tokens", responses=ANTHROPIC_ERRORS)
    async def count_tokens(body: CountTokensRequest, response: Response) -> TokenCount:
        """How many tokens the prompt of such a request has."""
        told(response, body)
        return await service.count_tokens(body)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The names of the one model that is served."""
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{model:path}")  # names may hold slashes
    async def retrieve_model(model: str) -> Model:
        """One of these names."""
        service.check_model(model)
        return card(model)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, response: Response) -> Tokenized:
        """The tokens of a prompt, or of messages as the chat template renders them."""
        told(response, body)
        return await service.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, response: Response) -> Detokenized:
        """The text of tokens."""
        told(response, body)
        return await service.detokenize(body)

    @app.get("/health")
    async def health() -> Health:
        """Whether the engine can serve; needs no API key."""
        if not client.healthy:
            raise EngineError(client.unhealthy_reason)
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> Version:
        """The version of miniserve."""
        return {"version": __version__}

    @app.get("/v1/conversations")
    async def conversations(
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
    ) -> ConversationList:
        """The conversations that are known, the latest first: where their KV lives, and how many turns they had."""
        return conversation_list(client.scheduler, time.monotonic(), limit)

    @app.get("/v1/conversations/{conversation:path}")
    async def conversation(conversation: str) -> ConversationDetail:
        """One of them: what was observed of its last turns, and where their time went."""
        found = conversation_detail(client.scheduler, conversation, time.monotonic())
        if found is None:
            raise errors.ApiError(
                404,
                f"No conversation {conversation[:128]!r} is known (any more): see GET /v1/conversations.",
                code="conversation_not_found",
            )
        return found

    @app.get("/v1/workers")
    async def workers() -> WorkerList:
        """The workers that live: KV, load, what was measured of them, and of KV that went between them."""
        return worker_list(client.scheduler, client.policy_name, time.monotonic())

    @app.get(
        "/v1/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"itemSchema": NEWS}}}},
    )
    async def events() -> Response:
        """What happens, as server-sent events: decisions and outcomes when they are made, once a second workers and
        turns. Whoever does not keep up loses the oldest, and is told of it."""
        return page.LiveEvents(feed)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    page.install(app)
    return app
