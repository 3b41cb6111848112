"""Answers as server-sent events and in one piece. Both end their turns as soon as the client disconnects."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from miniserve.api.errors import as_api_error
from miniserve.api.fields import ignored_header
from miniserve.api.generation import Generation, ResponseWriter
from miniserve.api.race import Stopped, unless

logger = logging.getLogger(__name__)
NamedEvent = tuple[str, dict[str, Any]]


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone. `receive` is ASGI's, after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def data_event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(name: str, data: Mapping[str, Any]) -> bytes:
    """An event with a name, which its data hold too, as `type`."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode({"type": name, **data}) + b"\n\n"


COMMENT = b": ping\n\n"
"""An event without fields: parsers pass over it, and connections are seen to be alive."""


class EventStream(StreamingResponse):
    """Sends `events`, and closes them when the client disconnects. When there was none for `seconds` it sends `ping`;
    never, if that is 0. The status goes with the first event: what is raised before it is an answer of its own."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], seconds: float = 0.0, ping: bytes = COMMENT) -> None:
        # Proxies that buffer (nginx) would hold back tokens.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._seconds, self._ping, self._sent = events, seconds, ping, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(Stopped):
                await unless(disconnected(receive), self._send(send))

    async def _send(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        self._sent = time.monotonic()
        pings = asyncio.create_task(self._send_pings(send))
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sent = time.monotonic()
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pings(self, send: Send) -> None:
        while self._seconds:
            if (silent := time.monotonic() - self._sent) < self._seconds:
                await asyncio.sleep(self._seconds - silent)
            else:
                self._sent += silent
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})


async def whole_answer(generation: Generation, writer: ResponseWriter, receive: Receive) -> Response:
    async with generation:
        try:
            await unless(disconnected(receive), generation.finish())
        except Stopped:
            return Response(status_code=499)  # for the access log
    # One with log-probabilities of prompts takes a while, in which other streams go on.
    scored = any(choice.prompt_logprobs for choice in generation.choices)
    answer = await asyncio.to_thread(writer.response, generation) if scored else writer.response(generation)
    return json_answer(answer)


def json_answer(data: Any, ignored: Iterable[str] = ()) -> Response:
    """`data` in one piece; a header names what of the request was `ignored`."""
    return Response(msgspec.json.encode(data), headers=ignored_header(ignored), media_type="application/json")


async def answer_events(generation: Generation, writer: ResponseWriter) -> AsyncGenerator[bytes, None]:
    """The events of a stream, whose turns end with it: when it fails, those of the error, since the status is sent."""
    async with generation:
        try:
            async for data in writer.stream(generation):
                yield data
        except Exception as error:
            answer = as_api_error(error)
            if answer.code == "internal_error":
                logger.exception("a stream ended in an error")
            yield writer.error_events(answer)
