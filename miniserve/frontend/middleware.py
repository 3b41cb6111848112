"""What happens to every request before and after its route, in plain ASGI: nothing here buffers a stream."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniserve.frontend.errors import ApiError


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


class ApiKey:
    """Lets in whoever knows the key, and everybody to /health."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, token = _header(scope, b"authorization").partition(b" ")
            # The comparison takes the same time wherever the first difference is.
            if not (hmac.compare_digest(token.strip(), self._key) and scheme.lower() == b"bearer"):
                refusal = ApiError(
                    401,
                    "A valid API key is needed: send the one given to --api-key as `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await refusal.response(scope, receive, send)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether or not the request says how long it is."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = ApiError(413, f"The body is larger than {self._limit} bytes.", code="request_too_large")
        length = _header(scope, b"content-length")
        # Python does not read numbers of thousands of digits.
        if length.isdigit() and (len(length) > 15 or int(length) > self._limit):
            return await refusal.response(scope, receive, send)
        taken = 0

        async def receive_counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise refusal
            return message

        await self._app(scope, receive_counted, send)
