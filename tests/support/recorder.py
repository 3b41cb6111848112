"""A server in front of another one that passes on all requests and answers, and keeps what was asked and counted."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web


class Request(NamedTuple):
    """A request, and what its answer counted: tokens of the prompt, those of them that were cached, of the answer."""

    path: str
    body: dict[str, Any]
    status: int
    prompt: int
    cached: int
    output: int


@contextmanager
def recorder(url: str) -> Iterator[tuple[str, list[Request]]]:
    """The address of a recorder in front of `url`, and the list of requests, which grows while it runs."""
    requests: list[Request] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(_start(url, requests), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}", requests
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _start(url: str, requests: list[Request]) -> tuple[web.AppRunner, int]:
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)

    async def passed_on(request: web.Request) -> web.StreamResponse:
        asked = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOPS}
        async with session.request(request.method, url + request.path_qs, data=asked, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.headers.update((n, v) for n, v in answer.headers.items() if n.lower() not in HOPS)
            await response.prepare(request)
            text = b""
            async for piece in answer.content.iter_any():
                text += piece
                with suppress(ConnectionError):  # some clients leave when they have seen all that they want
                    await response.write(piece)
        if request.method == "POST":
            requests.append(Request(request.path, json.loads(asked), answer.status, *_usage(text.decode())))
        return response

    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", passed_on)
    app.on_cleanup.append(lambda _: session.close())
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, runner.addresses[0][1]


HOPS = ("host", "content-length", "transfer-encoding", "accept-encoding", "connection")


def _usage(text: str) -> tuple[int, int, int]:
    """Tokens of the prompt, those of them that were cached, and those of the answer, by the last usage in an answer."""
    found = re.findall(r'"usage": ?(\{(?:[^{}]|\{[^{}]*\})*\})', text)
    usage = json.loads(found[-1]) if found else {}
    output = usage.get("completion_tokens", usage.get("output_tokens", 0))
    if (read := usage.get("cache_read_input_tokens")) is not None:  # /v1/messages counts these apart
        return usage["input_tokens"] + read, read, output
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return usage.get("prompt_tokens", usage.get("input_tokens", 0)), details.get("cached_tokens", 0), output
