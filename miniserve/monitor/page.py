"""The dashboard: the files of its page, and the stream of events that it listens to."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from miniserve.api.errors import ApiError
from miniserve.api.streaming import ClientGone, while_connected
from miniserve.monitor.events import Feed, FeedEvent, Listener, TooManyListeners

FOLDER = Path(__file__).with_name("dashboard")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page asks only this server, runs only our files, and nobody can frame it or send its forms elsewhere. Should the
# name of a conversation ever be taken for HTML, nothing in it would run.
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " + "; ".join(
    f"{kind}-src 'self'" for kind in ("script", "style", "connect", "img")
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for again each time: one answer without a body
}


def install(app: FastAPI) -> None:
    """Serve the page at / and its files below /dashboard/. They are read once: all of them are small."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in files.items()}

    @app.get("/", include_in_schema=False)
    @app.get("/dashboard/{name}", include_in_schema=False)
    async def page(request: Request, name: str = "index.html") -> Response:
        if name not in files:
            raise ApiError(404, f"The dashboard has no file {name[:128]!r}: it is at /.")
        headers = {**HEADERS, "ETag": tags[name]}
        if tags[name] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=TYPES[Path(name).suffix])


class LiveEvents(Response):
    """Sends the events of `feed` until the client goes or the server ends."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed) -> None:
        self.status_code = 200
        self.background = None
        self._feed = feed
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone), self._feed.listener() as listener:
                await while_connected(receive, self._send_all(listener, send))
        except TooManyListeners as error:
            refusal = ApiError(
                503, f"{error} Try again later.", code="too_many_listeners", headers={"Retry-After": "30"}
            )
            await refusal.response(scope["path"])(scope, receive, send)

    async def _send_all(self, listener: Listener, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while events := await listener.take():
            await send({"type": "http.response.body", "body": b"".join(map(as_sse, events)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_sse(event: FeedEvent) -> bytes:
    """As a server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (event.kind.encode(), event.data)
