"""What happens to every request before and after its route: its id, the API key, bounds on its head and its body.

All of it is plain ASGI that buffers no stream, but for `Connection`: uvicorn keeps whatever a client sends as a head,
for as long as the client likes, and calls no ASGI app before a head is complete.
"""

import asyncio
import contextlib
import hmac
import re
import time
import uuid
from typing import Any

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miniserve.api.errors import ApiError, is_anthropic
from miniserve.config import problem
from miniserve.monitor.metrics import Metrics

MAX_HEAD_BYTES = 64 * 1024
"""Most bytes of a head that is not complete yet; what comes with one read may be more."""
HEAD_SECONDS = 60.0
BODY_SECONDS = 60.0
"""How long a head and a body may take to arrive."""
LINGER_SECONDS = 5.0
"""How long the server reads on after it has refused a body."""
CLOSE = {"Connection": "close"}
OPEN_PATHS = re.compile(r"/|/health|/dashboard/.*", re.DOTALL)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class Edge:
    """The outermost layer. Takes a proxy's prefix `root` off the path, whether or not the proxy has done so; gives each
    request an id, the client's `X-Request-Id` if that is printable ASCII, and returns it as a header; answers HEAD like
    GET, without a body and, of streams too, at once; counts and times requests by their route."""

    def __init__(self, app: ASGIApp, root: str, metrics: Metrics) -> None:
        self._app = app
        self._root = root
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        if self._root and path == self._root:  # what the page refers to lies beside it
            return await RedirectResponse(f"{self._root}/")(scope, receive, send)
        if path.startswith(f"{self._root}/"):
            path = path[len(self._root) :]
        given = _header(scope, b"x-request-id")
        request_id = given if re.fullmatch(rb"[!-~]{1,128}", given) else uuid.uuid4().hex.encode()
        inner = {**scope, "path": path, "root_path": self._root, "method": "GET" if method == "HEAD" else method}
        inner["state"] = {**scope.get("state", {}), "request_id": request_id.decode()}
        names = (b"x-request-id", b"request-id") if is_anthropic(inner) else (b"x-request-id",)
        ids = [(name, request_id) for name in names]
        began, status = time.perf_counter(), 499

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *ids]
            elif method == "HEAD":
                return
            await send(message)
            if method == "HEAD":
                await send({"type": "http.response.body"})

        try:
            await self._app(inner, receive, send_on)
        finally:
            handler = getattr(inner.get("route"), "path", "none")
            self._metrics.requested(method, status, handler, time.perf_counter() - began)


class ApiKey:
    """Lets in requests with the key. /health needs none, nor does the dashboard's page, which then asks for it."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not OPEN_PATHS.fullmatch(scope["path"]):
            scheme, _, token = _header(scope, b"authorization").partition(b" ")
            # A comparison takes the same time wherever the first difference is.
            bearer = hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"
            if not (bearer or hmac.compare_digest(_header(scope, b"x-api-key"), self._key)):
                challenge = {"WWW-Authenticate": "Bearer"}
                refusal = ApiError(401, problem("api.no_key"), code="invalid_api_key", headers=challenge)
                return await refusal.response(scope)(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether or not a request announces its length, and slow bodies."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        large = f"The body is larger than {self._limit} bytes."
        refusal = ApiError(413, large, code="request_too_large", headers=CLOSE)
        length = _header(scope, b"content-length")
        # Python does not read numbers of thousands of digits.
        if length.isdigit() and (len(length) > 15 or int(length) > self._limit):
            if not _header(scope, b"expect"):  # a client that waits for "100 Continue" has not begun
                await _linger(receive)
            return await refusal.response(scope)(scope, receive, send)
        taken, complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_body() -> Message:
            nonlocal taken, complete
            if complete:  # only a disconnect can come now, at any time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                slow = problem("api.slow_body", seconds=BODY_SECONDS)
                raise ApiError(408, slow, code="request_timeout", headers=CLOSE) from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self._limit:
                if not complete:
                    await _linger(receive)
                raise refusal
            return message

        await self._app(scope, receive_body, send)


async def _linger(receive: Receive) -> None:
    """Read the rest of a body, for a while: clients read no answer on a connection that is closed before."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's that refuses large heads, and closes when a head takes long."""

    _bytes = 0  # of this head so far, or of head and body
    _whole = False  # the head is complete
    _late: asyncio.TimerHandle

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._late.cancel()
        self._whole = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._whole, self._bytes = False, 0

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        super().data_received(data)
        if self._whole or self._bytes <= MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            error = ApiError(431, problem("api.long_head", most=MAX_HEAD_BYTES))
            body = bytes(error.response({"path": ""}).body)
            about = f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n%s\r\n" % about.encode() + body)
        self.transport.close()
