"""The routes of /v1/responses. What they answer is kept, so that a later request can go on with it."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from miniserve.api import errors
from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice
from miniserve.api.openai.chat import ChatRenderer, chat_tokens
from miniserve.api.responses.items import OUTPUT, Item, with_ids
from miniserve.api.responses.schemas import RESPONSES_NAMES, InputTokensRequest, ResponsesRequest
from miniserve.api.responses.store import Conversations, Limit, Order, ResponseStore, Stored, continuing, page
from miniserve.api.responses.writer import ResponsesWriter
from miniserve.api.service import Service
from miniserve.api.streaming import json_answer


class ResponsesRoutes:
    """Also holds the `conversations` that responses may belong to."""

    def __init__(self, service: Service) -> None:
        self.conversations = Conversations()
        self._service = service
        self._store = ResponseStore("response")

    async def create(self, request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation, or go on with one that is stored; with `stream` true as server-sent events."""
        previous = self._previous(body)
        new = with_ids(body.items)
        items = [*self._past(body, previous), *new]

        def keep(answer: dict[str, Any], choice: Choice) -> None:
            output = OUTPUT.validate_python(answer["output"])
            if body.conversation:
                self.conversations.extend(body.conversation, [*new, *output])
            if body.store is not False:
                assert choice.turn is not None
                tokens = len(choice.prompt) + choice.output_tokens
                whole = (*items, *output)
                stored = Stored(whole, tokens, choice.turn.conversation, msgspec.json.encode(answer), len(output))
                self._store.put(answer["id"], stored)

        # The id is a key to the stored response, so clients cannot choose it.
        head = self._service.head(f"resp_{uuid.uuid4().hex}", body.model)
        with errors.renamed(RESPONSES_NAMES):
            chat, offered = await asyncio.to_thread(body.chat, items)
            renderer = ChatRenderer(self._service.tokenizer, self._service.dialect, chat)
            writer = ResponsesWriter(head, body, offered, self._service.tokenizer, keep)
            with continuing(previous) as conversation:
                known = conversation or body.conversation or ""
                return await self._service.generate(request, body, chat, renderer, writer, known)

    async def count_input(self, body: InputTokensRequest) -> Response:
        """How many tokens the prompt of such a request has."""
        self._service.check_model(body.model)
        past = self._past(body, self._previous(body))
        with errors.renamed(RESPONSES_NAMES):
            chat, _ = await asyncio.to_thread(body.chat, [*past, *body.items])
            tokens = await asyncio.to_thread(chat_tokens, self._service.tokenizer, self._service.dialect, chat)
        return json_answer({"object": "response.input_tokens", "input_tokens": len(tokens)}, body.ignored)

    async def retrieve(self, response: str, stream: bool = False) -> Response:
        """A response that is stored, as it was answered."""
        if stream:
            raise ApiError(400, "A stored response comes whole: leave `stream` out.", param="stream")
        return json_answer(msgspec.Raw(self._stored(response).answer))

    async def list_input(
        self, response: str, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> Response:
        """The items that a response was made from, those of earlier turns, too; the latest first."""
        stored = self._stored(response)
        return page(stored.items[: len(stored.items) - stored.output], limit, order, after)

    async def delete(self, response: str) -> Response:
        """Forget a response; those that have gone on behind it stay as they are."""
        self._stored(response)
        self._store.delete(response)
        return json_answer({"id": response, "object": "response", "deleted": True})

    def _past(self, body: InputTokensRequest, previous: Stored | None) -> Sequence[Item]:
        if body.conversation:
            return self.conversations.items(body.conversation)
        return previous.items if previous else ()

    def _previous(self, body: InputTokensRequest) -> Stored | None:
        """The response that a request continues, None if it names none. Raises `ApiError` if it is not here."""
        param, id = "previous_response_id", body.previous_response_id
        more = f". Send the whole conversation as `input`, without `{param}`."
        return None if id is None else self._store.find(id, more, param=param, code="previous_response_not_found")

    def _stored(self, id: str) -> Stored:
        return self._store.find(id, ", unless `store` is false or they failed.", code="response_not_found")
