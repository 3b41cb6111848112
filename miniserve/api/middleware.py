"""What happens to every request before and after its route, in plain ASGI: nothing here buffers a stream."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniserve.api.errors import ApiError

BODY_SECONDS = 60.0
"""How long a request's body may take to arrive."""
LINGER_SECONDS = 5.0
"""How long to read on after a body was refused."""
CLOSE = {"Connection": "close"}


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


class RequestId:
    """Gives each request an id, its own `X-Request-Id` where that is printable ASCII, and returns it as a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = _header(scope, b"x-request-id")
        request_id = given if re.fullmatch(rb"[!-~]{1,128}", given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def is_open(path: str) -> bool:
    """Whether a path needs no API key."""
    return path in ("/", "/health") or path.startswith("/dashboard/")


class ApiKey:
    """Lets in whoever knows the key. Everybody may see /health and the dashboard's page, which shows nothing until it
    is given the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            scheme, _, token = _header(scope, b"authorization").partition(b" ")
            # A comparison takes the same time wherever the first difference is.
            bearer = hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"
            if not (bearer or hmac.compare_digest(_header(scope, b"x-api-key"), self._key)):
                refusal = ApiError(
                    401,
                    "A valid API key is needed: send the one given to --api-key as `Authorization: Bearer KEY` (or "
                    "`x-api-key: KEY`).",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await refusal.response(scope["path"])(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether or not the request says how long it is, and slow ones."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = ApiError(
            413, f"The body is larger than {self._limit} bytes.", code="request_too_large", headers=CLOSE
        )
        length = _header(scope, b"content-length")
        # Python does not read numbers of thousands of digits.
        if length.isdigit() and (len(length) > 15 or int(length) > self._limit):
            if not _header(scope, b"expect"):  # a client that waits for "100 Continue" has not begun
                await _linger(receive)
            return await refusal.response(scope["path"])(scope, receive, send)
        taken, complete = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_body() -> Message:
            nonlocal taken, complete
            if complete:  # all that can come is a disconnect, at any time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"The body did not arrive within {BODY_SECONDS:g} s: send as many bytes as you announce, or fewer.",
                    code="request_timeout",
                    headers=CLOSE,
                ) from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self._limit:
                if not complete:
                    await _linger(receive)
                raise refusal
            return message

        await self._app(scope, receive_body, send)


async def _linger(receive: Receive) -> None:
    """Read what is left of a body, for a while.

    Clients look for an answer when they have sent everything, and find none if the connection is closed before.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass
