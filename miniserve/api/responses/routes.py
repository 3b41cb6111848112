"""The routes of /v1/responses. What they answer is kept, so that a later request can go on with it."""

import asyncio
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from miniserve.api import errors
from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice
from miniserve.api.openai.chat import ChatRenderer
from miniserve.api.responses.items import OUTPUT, Call, CallOutputItem, Item, ToolsItem, with_ids
from miniserve.api.responses.schemas import ResponsesRequest
from miniserve.api.responses.store import Conversations, Limit, Order, ResponseStore, Stored, continuing, page
from miniserve.api.responses.writer import ResponsesWriter
from miniserve.api.service import Service
from miniserve.api.streaming import json_answer


class ResponsesRenderer(ChatRenderer):
    """The prompt of a response to `items`. Where `truncation` allows, the oldest are left out of one that would leave
    no room for an answer. Many items take a while, so it is not made on the event loop."""

    def __init__(self, service: Service, body: ResponsesRequest, items: Sequence[Item]) -> None:
        self.chat, self.offered = body.chat(items)
        super().__init__(service.tokenizer, service.dialect, self.chat)
        self._body = body
        self._items = items
        room = service.client.max_model_len
        self._most = room - min(self.chat.max_completion_tokens or room // 8, room // 2)

    def prompts(self) -> list[list[int]]:
        prompts = super().prompts()
        if self._body.truncation != "auto" or len(prompts[0]) <= self._most:
            return prompts
        self.relaxed.add("input")
        # A result without its call would say nothing.
        results = CallOutputItem, ToolsItem
        calls: dict[str | None, int] = {item.call_id: n for n, item in enumerate(self._items) if isinstance(item, Call)}
        needs = [calls.get(item.call_id, n) if isinstance(item, results) else n for n, item in enumerate(self._items)]
        needed = [*accumulate(reversed(needs), min)][::-1]  # from there on
        if starts := [number for number, first in enumerate(needed) if 0 < number == first]:
            at = bisect_left(starts, True, key=lambda start: self._length_from(start) <= self._most)
            self._length_from(starts[min(at, len(starts) - 1)])
        return super().prompts()

    def _length_from(self, start: int) -> int:
        """How long the prompt is without the items before `start`, which it then goes without."""
        self._request = self._body.chat(self._items[start:])[0]
        return len(super().prompts()[0])


class ResponsesRoutes:
    """Also holds the `conversations` that responses may belong to."""

    def __init__(self, service: Service) -> None:
        self.conversations = Conversations()
        self._service = service
        self._store = ResponseStore("response", ", unless `store` is false or they failed")

    async def create(self, request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation, or go on with one that is stored; with `stream` true as server-sent events."""
        new = with_ids(body.items)
        previous, past = self._before(body)
        items = [*past, *new]

        def keep(answer: dict[str, Any], choice: Choice) -> None:
            output = OUTPUT.validate_python(answer["output"])
            if body.conversation:
                self.conversations.extend(body.conversation, [*new, *output])
            if body.store:
                assert choice.turn is not None
                tokens = len(choice.prompt) + choice.output_tokens
                whole = (*items, *output)
                stored = Stored(whole, tokens, choice.turn.conversation, msgspec.json.encode(answer), len(output))
                self._store.put(answer["id"], stored)

        # The id is a key to the stored response, so clients cannot choose it.
        head = self._service.head(f"resp_{uuid.uuid4().hex}", body.model)
        with errors.renamed("responses"):
            renderer = await asyncio.to_thread(ResponsesRenderer, self._service, body, items)
            writer = ResponsesWriter(head, body, renderer.offered, self._service.tokenizer, keep)
            with continuing(previous) as conversation:
                known = conversation or body.conversation or ""
                return await self._service.generate(request, body, renderer.chat, renderer, writer, known)

    async def count_input(self, body: ResponsesRequest) -> Response:
        """How many tokens the prompt of such a request has."""
        self._service.check_model(body.model)
        items = [*self._before(body)[1], *body.items]
        with errors.renamed("responses"):
            renderer = await asyncio.to_thread(ResponsesRenderer, self._service, body, items)
            (prompt,) = await asyncio.to_thread(renderer.prompts)
        return json_answer({"object": "response.input_tokens", "input_tokens": len(prompt)}, body.ignored)

    async def retrieve(self, response: str, stream: bool = False) -> Response:
        """A response that is stored, as it was answered."""
        if stream:
            raise ApiError(400, "A stored response comes whole: leave `stream` out.", param="stream")
        return json_answer(msgspec.Raw(self._store.find(response).answer))

    async def list_input(
        self, response: str, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> Response:
        """The items that a response was made from, those of earlier turns, too; the latest first."""
        stored = self._store.find(response)
        return page(stored.items[: len(stored.items) - stored.output], limit, order, after)

    async def delete(self, response: str) -> Response:
        """Forget a response; those that have gone on behind it stay as they are."""
        self._store.find(response)
        self._store.delete(response)
        return json_answer({"id": response, "object": "response", "deleted": True})

    def _before(self, body: ResponsesRequest) -> tuple[Stored | None, Sequence[Item]]:
        """The response that a request continues, if it names one, and the items before its own. Raises `ApiError`."""
        if body.conversation:
            return None, self.conversations.items(body.conversation)
        if body.previous_response_id is None:
            return None, ()
        more = " Send the whole conversation as `input`, without `previous_response_id`."
        previous = self._store.find(body.previous_response_id, "previous_response_id", more)
        return previous, previous.items
