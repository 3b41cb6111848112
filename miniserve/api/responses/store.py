"""What the server keeps in memory, within bounds: responses, which a later request may continue as its previous
response, and OpenAI's Conversations API, item by item, for /v1/responses to go on with."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from fastapi import Query
from starlette.responses import Response

from miniserve.api.errors import ApiError
from miniserve.api.fields import RequestBody
from miniserve.api.responses.items import Item, Items, item_out, with_ids
from miniserve.api.responses.schemas import Metadata
from miniserve.api.streaming import json_answer
from miniserve.config import problem

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]
MAX_RESPONSES = 10_000
MAX_TOKENS = 32 * 2**20
"""Of all responses. Each counts in full, whatever it shares with others: of long conversations the latest stay."""
BYTES_PER_TOKEN = 4
"""Of answers, which count too: each repeats its tools and instructions."""


@dataclass
class Stored:
    """The whole conversation up to a response: `items`, `tokens` long. `conversation` is the scheduler's name of it,
    `answer` is the response itself as JSON, and `output` the number of items that it has added."""

    items: tuple[Item, ...]
    tokens: int
    conversation: str | int
    answer: bytes = b""
    output: int = 0
    continued: bool = False
    """Whether a response has followed already: the next one is a fork."""

    @property
    def size(self) -> int:
        """In tokens."""
        return self.tokens + len(self.answer) // BYTES_PER_TOKEN


class ResponseStore:
    """The least recently used response goes first. `what` is stored, `unless` what, is for errors."""

    def __init__(self, what: str, unless: str = "") -> None:
        self._what, self._unless = what, unless
        self._tokens = 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, id: str, stored: Stored) -> None:
        self.delete(id)
        self._stored[id] = stored
        self._tokens += stored.size
        while len(self._stored) > MAX_RESPONSES or self._tokens > MAX_TOKENS:
            self.delete(next(iter(self._stored)))

    def get(self, id: str) -> Stored | None:
        if id in self._stored:
            self._stored.move_to_end(id)
        return self._stored.get(id)

    def delete(self, id: str) -> None:
        """Forget a response, if it is there. Responses behind it keep the items that they share with it."""
        if (gone := self._stored.pop(id, None)) is not None:
            self._tokens -= gone.size

    def find(self, id: str, param: str | None = None, more: str = "") -> Stored:
        """As `get`. Raises `ApiError` about `param` if it is not here; `more` is the end of its message."""
        if (stored := self.get(id)) is None:
            param = param or self._what
            said = problem("api.not_kept", what=self._what, id=id[:128], unless=self._unless, more=more)
            raise ApiError(404, said, param=param, code=f"{param.removesuffix('_id')}_not_found")
        return stored


@contextmanager
def continuing(previous: Stored | None) -> Iterator[str | int]:
    """The conversation of a response that follows `previous`, or "". Only one response continues the conversation,
    unless it fails. All others are forks, and the scheduler finds their conversations by their prompts."""
    if previous is None or previous.continued:
        yield ""
        return
    previous.continued = True
    try:
        yield previous.conversation
    except BaseException:
        previous.continued = False
        raise


class MetadataRequest(RequestBody):
    metadata: Metadata | None = None


class ConversationRequest(MetadataRequest):
    items: Items | None = None


class ItemsRequest(RequestBody):
    items: Items


def page(items: Sequence[Item], limit: int, order: Order, after: str | None, ignored: Iterable[str] = ()) -> Response:
    """Up to `limit` of `items`, behind the one with the id `after` in this `order`. Raises `ApiError`."""
    ordered = list(items if order == "asc" else reversed(items))
    if after is not None:
        place = next((number for number, item in enumerate(ordered) if item.id == after), None)
        if place is None:
            raise ApiError(400, f"`after` names {after[:128]!r}, which is none of the items.", param="after")
        ordered = ordered[place + 1 :]
    shown = [item_out(item) for item in ordered[:limit]]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    listed = {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": len(ordered) > limit}
    return json_answer(listed, ignored)


class Conversations:
    """The routes of /v1/conversations, and what they know. All methods raise `ApiError` for what is not here."""

    def __init__(self) -> None:
        self._stored = ResponseStore("conversation")

    def items(self, id: str) -> Sequence[Item]:
        return self._stored.find(id).items

    def extend(self, id: str, items: Sequence[Item]) -> None:
        """Add what a turn has brought, unless the conversation has been deleted meanwhile."""
        if (stored := self._stored.get(id)) is not None:
            tokens = stored.tokens + _tokens(items)
            self._stored.put(id, replace(stored, items=(*stored.items, *items), tokens=tokens))

    async def create(self, body: ConversationRequest) -> Response:
        """Begin a conversation, with items or none."""
        id, now = f"conv_{secrets.token_hex(24)}", int(time.time())
        made = {"id": id, "object": "conversation", "created_at": now, "metadata": body.metadata or {}}
        items = with_ids(body.items or [])
        self._stored.put(id, Stored((*items,), _tokens(items), id, msgspec.json.encode(made)))
        return json_answer(made, body.ignored)

    async def retrieve(self, conversation: str) -> Response:
        """What is known of a conversation beside its items."""
        return json_answer(msgspec.Raw(self._stored.find(conversation).answer))

    async def update(self, conversation: str, body: MetadataRequest) -> Response:
        """Give a conversation other metadata."""
        stored = self._stored.find(conversation)
        made = {**msgspec.json.decode(stored.answer), "metadata": body.metadata or {}}
        self._stored.put(conversation, replace(stored, answer=msgspec.json.encode(made)))
        return json_answer(made, body.ignored)

    async def delete(self, conversation: str) -> Response:
        """Forget a conversation and its items."""
        self._stored.find(conversation)
        self._stored.delete(conversation)
        return json_answer({"id": conversation, "object": "conversation.deleted", "deleted": True})

    async def list_items(
        self, conversation: str, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> Response:
        """The items of a conversation, the latest first."""
        return page(self.items(conversation), limit, order, after)

    async def add_items(self, conversation: str, body: ItemsRequest) -> Response:
        """Add items at the end of a conversation."""
        self._stored.find(conversation)
        added = with_ids(body.items)
        self.extend(conversation, added)
        return page(added, len(added), "asc", None, body.ignored)

    async def retrieve_item(self, conversation: str, item: str) -> Response:
        """One item of a conversation."""
        return json_answer(item_out(self._item(conversation, item)))

    async def delete_item(self, conversation: str, item: str) -> Response:
        """Take an item out of a conversation."""
        stored, gone = self._stored.find(conversation), self._item(conversation, item)
        left = tuple(one for one in stored.items if one is not gone)
        self._stored.put(conversation, replace(stored, items=left, tokens=stored.tokens - _tokens([gone])))
        return await self.retrieve(conversation)

    def _item(self, conversation: str, id: str) -> Item:
        found = next((item for item in self.items(conversation) if item.id == id), None)
        if found is None:
            raise ApiError(404, f"This conversation has no item {id[:128]!r}.", param="item", code="item_not_found")
        return found


def _tokens(items: Sequence[Item]) -> int:
    """About how many tokens items hold."""
    return sum(len(item.model_dump_json()) for item in items) // BYTES_PER_TOKEN
