"""Server-sent events, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from miniserve.api.errors import ApiError, as_api_error
from miniserve.api.generation import Choice, Generation, usage
from miniserve.api.openai.answers import Head
from miniserve.api.openai.schemas import StreamOptions
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.reader import Part

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody is there any more to read the answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client disconnects, `work` is cancelled at once: raises `ClientGone`.

    `receive` is ASGI's, after the body has been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = doing, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ChunkShape(Protocol):
    """How choices look in the chunks of one of the APIs: mappings, encoded as JSON.

    With `token_ids` they tell the tokens, and each token has a chunk even if it has no text (yet).
    """

    token_ids: bool
    stream_options: StreamOptions | None

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        """Before anything was generated."""

    def beside_opening(self, choice: Choice) -> Mapping[str, Any]:
        """What the chunk of the opening says beside it."""

    def piece(self, choice: Choice, part: Part, logprobs: list[TokenLogprob]) -> Mapping[str, Any]:
        """A further part of the answer."""

    def closing(self, choice: Choice) -> Mapping[str, Any]:
        """The choice's last chunk."""


async def events(
    generation: Generation, shape: ChunkShape, head: Mapping[str, Any], include_usage: bool, continuous_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream but for `[DONE]`; those that can be sent together come in one piece.

    `head` holds the fields that are the same in all chunks. With `include_usage` the last chunk tells the usage, and
    with `continuous_usage` every other one that of its choice so far. Raises what the generation failed of.
    """
    # Only the choice is encoded for each chunk; all around it is the same bytes.
    before = _before_choice(head)
    after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def event(choice: Choice, chunk: Mapping[str, Any], output_tokens: int, before: bytes = before) -> bytes:
        end = after
        if continuous_usage:
            used = usage(len(choice.prompt), choice.cached_tokens, [choice], output_tokens)
            end = b'],"usage":' + msgspec.json.encode(used) + b"}\n\n"
        return before + msgspec.json.encode(chunk) + end

    openings = [(choice, opening) for choice in generation.choices if (opening := shape.opening(choice)) is not None]
    yield b"".join(
        event(choice, opening, 0, _before_choice({**head, **shape.beside_opening(choice)}))
        for choice, opening in openings
    )
    async for news in generation.updates():
        chunks: list[bytes] = []
        for choice in news:
            by_token = shape.token_ids and choice.has_tokens
            if not (choice.has_parts or by_token):
                continue
            parts, logprobs = choice.take()
            for part in parts or ([""] if logprobs or by_token else []):
                # What belongs to tokens comes with the first part that they have made.
                chunks.append(event(choice, shape.piece(choice, part, logprobs), choice.output_tokens))
                logprobs = []
            if choice.finish is not None:
                chunks.append(event(choice, shape.closing(choice), choice.output_tokens))
        if chunks:
            yield b"".join(chunks)
    if include_usage:
        yield b"data: " + msgspec.json.encode({**head, "choices": [], "usage": generation.usage}) + b"\n\n"


def _before_choice(fields: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(fields)[:-1] + b',"choices":['


class Chunks:
    """How chat and text completions stream: in chunks, with `[DONE]` at the end. To be mixed into a `ChunkShape`."""

    ending = b"data: [DONE]\n\n"
    id_is_a_key = False
    stream_options: StreamOptions | None = None

    def stream(self: ChunkShape, head: Head, generation: Generation) -> AsyncIterator[bytes]:
        """All events but the ending. Raises what the generation failed of."""
        options = self.stream_options or StreamOptions()
        with_usage = bool(options.include_usage)
        return events(generation, self, head, with_usage, with_usage and bool(options.continuous_usage_stats))

    def broken(self, error: ApiError) -> bytes:
        """The event of what a stream failed of."""
        return b"data: " + msgspec.json.encode(error.body) + b"\n\n"


def named_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """One event with a name; the data hold it, too, as `type`."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **data}) + b"\n\n"


class EventStream(Response):
    """Sends the events of a generation as they come, and ends it when the client goes.

    An error in mid-stream, when the status has long been sent, becomes an event of its own, by `broken`; at the end
    stands `ending`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        stream: AsyncIterator[bytes],
        broken: Callable[[ApiError], bytes],
        ending: bytes,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._stream = stream
        self._broken = broken
        self._ending = ending
        # Proxies that buffer (nginx) would hold back tokens.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            async with self._generation:
                await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def send_body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._stream:
                await send_body(data)
        except Exception as error:
            told = as_api_error(error)
            if told.code == "internal_error":
                logger.exception("a stream ended in an error")
            await send_body(self._broken(told))
        await send_body(self._ending, more=False)
