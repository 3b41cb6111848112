"""One turn on the server: the request, and its answer as it streams in."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import aiohttp
import msgspec

from miniserve.bench.replay.metrics import TurnTimes
from miniserve.bench.replay.server import Event, TargetServer
from miniserve.client import CONNECT_SECONDS, message

KEEP_SECONDS = 4.0
"""How long an idle connection is used again: uvicorn closes it after 5, and a request sent at that moment is lost."""
LEAST_WAIT = 0.05
"""Seconds between two requests to a server that is full, even if its Retry-After is 0."""

Post = Callable[[], AbstractAsyncContextManager[aiohttp.ClientResponse]]


class TurnError(Exception):
    """A turn failed; the message says why."""


@dataclass(eq=False)
class Answer:
    """The answer to a prompt of `prompt` tokens so far. `times` (`time.monotonic`) are those of events with tokens."""

    prompt: int
    ids: list[int] = field(default_factory=list)
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    counts: tuple[int | None, int] | None = None
    """The server's own ones: tokens of the prompt that it found cached, and of the output."""

    def take(self, event: Event, now: float) -> None:
        """Add an event that came at `now`. Raises `TurnError` for one that reports an error."""
        if event.error:
            raise TurnError(f"The server failed after {self.tokens} tokens: {event.error}")
        if event.tokens:
            self.times.append(now)
            self.tokens += event.tokens
        if event.ids:
            self.ids += event.ids
        if event.output is not None:
            self.counts = event.cached, event.output


def session(api_key: str | None) -> aiohttp.ClientSession:
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        headers={"Content-Type": "application/json"} | key,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
    )


async def ask(post: Post, server: TargetServer, answer: Answer, timeout: float) -> TurnTimes:
    """Send a request by `post` and fill in `answer` until it is whole, within `timeout` seconds. A full server is asked
    again after its Retry-After. The turn's `error` says what failed."""
    full, error = "", ""
    sent = time.monotonic()
    try:
        async with asyncio.timeout(timeout):
            while wait := await _stream(post, server, answer):
                full = ": it was full"
                await asyncio.sleep(wait)
    except TurnError as failure:
        error = str(failure)
    except aiohttp.ClientError as failure:
        error = f"The connection broke after {answer.tokens} tokens: {str(failure) or type(failure).__name__}"
    except TimeoutError:
        error = f"The server did not finish within {timeout:g} s{full}"
    except msgspec.DecodeError as failure:
        error = f"The stream holds what is no chunk: {failure}"
    times = answer.times or [time.monotonic()]
    cached, output = answer.counts or (None, answer.tokens)  # the server's count goes before that of its events
    return TurnTimes(sent, times[0], times[-1], answer.prompt, cached, output, error)


async def _stream(post: Post, server: TargetServer, answer: Answer) -> float:
    """Ask once: 0, or the seconds after which to ask again."""
    async with post() as reply:
        if reply.status in (429, 503) and (after := reply.headers.get("Retry-After", "")).isdigit():
            await reply.read()
            return max(float(after), LEAST_WAIT)
        if reply.status != 200:
            raise TurnError(f"HTTP {reply.status}: {message(await reply.read())}")
        done = False
        rest = b""
        async for data in reply.content.iter_any():
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    event = server.event(line[5:].strip())
                    answer.take(event, now)
                    done = done or event.done
    if not done:
        raise TurnError(f"The stream broke off after {answer.tokens} tokens")
    return 0.0
